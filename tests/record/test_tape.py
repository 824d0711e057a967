"""The tape: what is recorded gives, replayed on other inputs, what the function gives."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from diffkiln.errors import DataDependent, RecordError
from diffkiln.interpreter.aten import Interpreter, type_of
from diffkiln.program import Program, TensorType, verify
from diffkiln.record.call import _step_end
from diffkiln.record.constants import Constants
from diffkiln.record.tape import Tape


def recorded(function, *examples: torch.Tensor) -> tuple[Program, dict[str, torch.Tensor]]:
    constants = Constants()
    tape = Tape(FakeTensorMode(allow_non_fake_inputs=True), constants, what="the function")
    inputs = [tape.new_input(f"x{index}", type_of(example)) for index, example in enumerate(examples)]
    with torch.inference_mode(), tape:
        result = function(*inputs)
    program = tape.finish("function", [result] if isinstance(result, torch.Tensor) else list(result))
    verify(program)
    return program, constants.tensors


def replayed(function, *examples: torch.Tensor) -> Program:
    """Record, and compare the replay with the function for two other inputs."""
    program, constants = recorded(function, *examples)
    for seed in (1, 2):
        generator = torch.Generator().manual_seed(seed)
        inputs = [torch.randn(x.shape, generator=generator).to(x.dtype) for x in examples]
        with torch.inference_mode():
            want = function(*[x.clone() for x in inputs])
            got = Interpreter(program)([x.clone() for x in inputs], {}, constants)
        for a, b in zip([want] if isinstance(want, torch.Tensor) else want, got, strict=True):
            assert torch.equal(a, b)
    return program


X = torch.zeros(4, 6)


def add_in_place(x):
    y = x * 2
    y += 1
    y.mul_(3)
    return y


def write_through_a_slice(x):
    y = x.clone()
    y[:, 0] = 7.0
    y[1:3, 2:4] += y[0:2, 0:2]
    return y


def write_through_a_view_and_read_the_base(x):
    y = x + 0
    view = y.view(2, 12)
    view[0].add_(5)
    return y, view * 2


def read_a_view_that_was_made_before_the_write(x):
    y = x + 0
    first = y[0]
    y.add_(1)
    return first * 2


def copy_into_a_real_tensor(x):
    out = torch.zeros(8, 6)
    out[2:6] = x
    return out * 2


def copy_into_zeros_like(x):
    out = torch.zeros_like(x)
    out[0].copy_(x[1])
    out[1].fill_(3)
    out[2].zero_()
    return out


def write_into_what_lies_transposed_in_memory(x):
    y = x.t() * 2  # gives what it is given: the columns lie together
    early = y[:, 1]
    y[1:3, 0] = 5.0
    y[:, 2:4] += y[:, 0:2]
    return y, early * 2, y.view(2, 3, 4)[0]


def write_into_what_is_permuted_in_memory(x):
    y = torch.zeros_like(x.reshape(1, 2, 2, 6).permute(0, 3, 1, 2))
    y[:, 0:2, 1] = x.reshape(1, 2, 2, 6).permute(0, 3, 1, 2)[:, 2:4, 0]
    y[:, 5].fill_(3)
    return y + 1


def write_with_a_wider_type(x):
    y = x.to(torch.bfloat16)
    y += torch.ones(6)
    return y


def second_names(x):
    return torch.clip(torch.subtract(torch.multiply(x, 3), 1), -1.0, 1.0), torch.less(torch.absolute(x), 0.5)


def attention(x):
    q = x.view(1, 1, 4, 6)
    return F.scaled_dot_product_attention(q, q, q)


def several_results(x):
    a, b = x.chunk(2, dim=1)
    return torch.cat([b, a], 1), x.max(dim=0).values


def composite(x):
    return F.layer_norm(F.linear(x, torch.ones(5, 6), torch.ones(5)), (5,)).reshape(-1, 2, 5)


def dropped_in_training_only(x):
    return F.dropout(x, 0.5, training=False) + 1


def literals(x):
    return (
        x.to(torch.float64).sum(dim=(0, 1), keepdim=True).expand(3, 2).contiguous(memory_format=torch.contiguous_format)
    )


@pytest.mark.parametrize(
    "function",
    [
        add_in_place,
        write_through_a_slice,
        write_through_a_view_and_read_the_base,
        read_a_view_that_was_made_before_the_write,
        copy_into_a_real_tensor,
        copy_into_zeros_like,
        write_into_what_lies_transposed_in_memory,
        write_into_what_is_permuted_in_memory,
        write_with_a_wider_type,
        second_names,
        attention,
        several_results,
        composite,
        dropped_in_training_only,
        literals,
    ],
    ids=lambda function: function.__name__,
)
def test_replay_is_bit_equal(function):
    replayed(function, X)


def test_two_inputs_and_kwargs():
    replayed(lambda x, y: torch.add(x, y, alpha=2.5), X, X)


def test_composite_operators_stay_whole():
    assert [op.name for op in recorded(attention, X)[0].ops][-1] == "aten.scaled_dot_product_attention.default"
    assert "aten.linear.default" in [op.name for op in recorded(composite, X)[0].ops]


def test_what_does_not_depend_on_the_request_folds_into_constants():
    def function(x):
        steps = torch.linspace(0, 1, 6)
        return x * steps.flip(0).cumsum(0)

    program, constants = recorded(function, X)
    assert [op.name for op in program.ops] == ["aten.mul.Tensor"]
    assert torch.equal(constants[program.constants[0]], torch.linspace(0, 1, 6).flip(0).cumsum(0))


def test_equal_constants_are_kept_once():
    _, constants = recorded(lambda x: x * torch.ones(6) + torch.ones(6), X)
    assert len(constants) == 1


def test_dead_operations_are_dropped():
    program, _ = recorded(lambda x: ((x * 3).sum(), x + 1)[1], X)
    assert [op.name for op in program.ops] == ["aten.add.Tensor"]


def test_a_constant_read_for_control_flow_is_no_problem():
    def function(x):
        return x * 2 if torch.ones(1).item() == 1 else x

    replayed(function, X)


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.sum() > 0),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.tolist(),
        lambda x: x.numpy(),
        lambda x: torch.equal(x, x + 1),
    ],
    ids=["item", "bool", "mask", "nonzero", "tolist", "numpy", "equal"],
)
def test_reading_the_request_is_data_dependent_and_names_the_line(read):
    with pytest.raises(DataDependent, match=r"test_tape\.py:\d+"):
        recorded(read, X)


def test_a_line_in_a_folder_of_our_name_is_named_too():
    namespace = {}
    exec(compile("def read(x):\n    return x.tolist()", "/home/user/diffkiln/torch/mine.py", "exec"), namespace)
    with pytest.raises(DataDependent, match=r"/home/user/diffkiln/torch/mine\.py:2 in read"):
        recorded(namespace["read"], X)


@pytest.mark.parametrize("read", ["tolist", "numpy"])
def test_reading_a_real_tensor_that_holds_the_request_is_data_dependent(read):
    def function(x):
        out = torch.zeros(4, 6)
        out.copy_(x)
        getattr(out[0], read)()
        return out

    with pytest.raises(DataDependent):
        recorded(function, X)


def test_reading_other_tensors_is_allowed_and_the_guards_go_with_the_tape():
    before = torch.Tensor.tolist
    replayed(lambda x: x * torch.tensor([2.0, 3.0]).tolist()[1], X)
    assert torch.Tensor.tolist is before


@pytest.mark.parametrize("draw", [lambda x: x + torch.randn(6), lambda x: F.dropout(x, 0.5, training=True)])
def test_randomness_is_refused(draw):
    with pytest.raises(RecordError, match="random"):
        recorded(draw, X)


def test_operators_outside_the_closed_list_are_refused():
    with pytest.raises(RecordError, match=r"aten\.\w+.*closed list"):
        recorded(lambda x: torch.linalg.svd(x)[1], X)


def test_values_from_outside_are_refused():
    other = Tape(FakeTensorMode(allow_non_fake_inputs=True), Constants()).new_input("y", type_of(X))
    with pytest.raises(RecordError):
        recorded(lambda x: x + other, X)


MASK = torch.tensor([True, False, True, True])
COUNTS = torch.tensor([1, 0, 2, 1])


def select_by_a_constant_mask(x):
    return x[MASK] * 2


def write_by_a_constant_mask(x):
    y = x.clone()
    y[MASK] *= 3
    y[:, MASK.repeat(2)[:6]] = 1.0
    return y


def repeat_by_constant_counts(x):
    return x.repeat_interleave(COUNTS, dim=0), x.repeat_interleave(torch.tensor(2), dim=1)


@pytest.mark.parametrize("function", [select_by_a_constant_mask, write_by_a_constant_mask, repeat_by_constant_counts])
def test_constant_masks_and_counts_decide_shapes(function):
    """They become positions, so that an engine sees no shape that a value decides."""
    program = replayed(function, X)
    assert not any("repeat_interleave" in op.name for op in program.ops)
    assert not any(type_.dtype == "bool" for type_ in program.types.values())


@pytest.mark.parametrize("select", [lambda x: x[x > 0], lambda x: x.repeat_interleave((x[:, 0] > 0).long(), dim=0)])
def test_masks_and_counts_of_the_request_are_data_dependent(select):
    with pytest.raises(DataDependent):
        recorded(select, X)


def test_dropout_in_place_is_nothing_in_evaluation():
    drop = torch.nn.Dropout(0.5, inplace=True).eval()
    assert not any("dropout" in op.name for op in replayed(lambda x: drop(x + 1), X).ops)


def test_conjugation_is_done_at_once():
    """As a bit of the tensor it would be lost on an engine, which is given the tensor's memory."""
    program = replayed(lambda x: torch.view_as_complex(x).conj(), torch.zeros(4, 2))
    assert [op.name for op in program.ops] == ["aten.view_as_complex.default", "aten.conj_physical.default"]


def test_double_complex_constants_are_kept_as_pairs():
    """safetensors knows no complex128, which rotary tables of video models have."""
    table = torch.polar(torch.ones(6, dtype=torch.float64), torch.arange(6, dtype=torch.float64))
    program = replayed(lambda x: torch.view_as_real(x.double() * table), X)
    assert {program.types[f"#{key}"].dtype for key in program.constants} == {"float64"}


def test_noise_of_the_callers_generator_is_recorded_and_that_of_another_is_the_same_in_every_call():
    tape = Tape(FakeTensorMode(allow_non_fake_inputs=True), Constants(), what="the function")
    shapes = []

    def noise(shape, dtype, generator, _distribution):
        shapes.append((tuple(shape), dtype, generator is None))
        return tape.blank(TensorType("float32", tuple(shape)))

    tape.noise, tape.callers_seed = noise, 11
    callers, other = torch.Generator().manual_seed(11), torch.Generator().manual_seed(5)
    with torch.inference_mode(), tape:
        own = torch.randn(2, 3, generator=other)
        marked = torch.randn(4, generator=callers, dtype=torch.float32)
        torch.randn_like(marked)
    assert torch.equal(own, torch.randn(2, 3, generator=torch.Generator().manual_seed(5)))
    assert not tape.is_marked(own)
    assert tape.is_marked(marked)
    assert shapes == [((4,), torch.float32, False), ((4,), torch.float32, True)]


def drawn(function):
    """What the function draws: the distributions and shapes in order, and the operations that it needs besides."""
    tape = Tape(FakeTensorMode(allow_non_fake_inputs=True), Constants(), what="the function")
    kinds = []

    def noise(shape, dtype, _generator, distribution):
        kinds.append((distribution, tuple(shape)))
        return tape.new_input("noise", TensorType("float32", tuple(shape)))

    tape.noise, tape.callers_seed = noise, 11
    marked = tape.new_input("x", TensorType("float32", (4, 3)))
    with torch.inference_mode(), tape:
        assert tape.is_marked(function(marked, torch.Generator().manual_seed(11)))
    return kinds, [op.name for op in tape.ops if op.name != "aten.detach.default"]


@pytest.mark.parametrize(
    ("function", "kinds", "ops"),
    [
        (lambda x, g: torch.rand(2, 3, generator=g), [("uniform", (2, 3))], []),
        (lambda x, g: torch.rand_like(x), [("uniform", (4, 3))], []),
        (
            lambda x, g: torch.zeros_like(x).uniform_(0, 1, generator=g),
            [("uniform", (4, 3))],
            ["aten.zeros_like.default"],
        ),
        (
            lambda x, g: torch.multinomial(x, 1, generator=g),
            [("exponential", (4, 3))],
            ["aten.div.Tensor", "aten.argmax.default"],
        ),
    ],
)
def test_noise_of_other_distributions_is_recorded(function, kinds, ops):
    assert drawn(function) == (kinds, ops)


@pytest.mark.parametrize(
    "function", [lambda x, g: x.uniform_(-1, 1, generator=g), lambda x, g: torch.multinomial(x, 2, generator=g)]
)
def test_noise_that_is_not_recorded_is_refused(function):
    with pytest.raises(RecordError, match="draws random numbers"):
        drawn(function)


def test_the_end_of_a_step_has_the_noisiest_timestep_where_each_frame_has_its_own():
    tape = Tape(FakeTensorMode(allow_non_fake_inputs=True), Constants(), what="the function")
    latents = tape.new_input("latents", type_of(X))
    with torch.inference_mode(), tape:
        _step_end(None, 1, torch.tensor([300.0, 900.0]), {"latents": latents})
    assert tape.ops[-1].attrs == {"step": 1, "timestep": 900.0}
