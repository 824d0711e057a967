"""Call programs for fewer adapters than there are slots: they compute the first slots alone, and give the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import diffkiln
from diffkiln.compiler.check import check_with
from diffkiln.compiler.compile import _recorded, _rewritten
from diffkiln.errors import ManifestInvalid
from diffkiln.interpreter.layers.slots import DOWN, FACTORS, UP
from diffkiln.interpreter.quiet import quiet_libraries
from diffkiln.passes.narrowing import narrowed
from diffkiln.program import CALL, REGION, Input, Module, Op, Program, Ref, TensorType
from diffkiln.program.narrowed import full, named_for, narrowed_of
from diffkiln.program.serial import program_from_json, program_to_json
from diffkiln.program.work import work_within
from diffkiln.record.constants import Constants
from diffkiln.record.pipeline import Recording
from tests.end_to_end.test_adapter_slots import slotted
from tests.end_to_end.test_adapters import drawn
from tests.pipelines import WARNING_FILTERS
from tests.runtime.adapters.files import adapter_of

pytestmark = [pytest.mark.filterwarnings(text) for text in WARNING_FILTERS]

X, SMALL = TensorType("float32", (2, 4)), TensorType("float32", (4,))


def recorded(spec: dict[str, Any]) -> Any:
    with quiet_libraries():
        return _rewritten(_recorded(check_with(spec, None))).recording


@pytest.fixture(scope="module")
def flux(tmp_path_factory) -> Any:
    return recorded(slotted("flux", tmp_path_factory.mktemp("flux")))


def test_calls_with_no_and_one_adapter_have_programs_of_their_own(flux):
    (calls,) = flux.calls
    assert set(calls) == {name for each in full(calls) for name in (each, f"{each}.slots-0", f"{each}.slots-1")}
    products = [
        sum(work_within(calls[name], flux.modules, "transformer").flops.values())
        for name in ("call.slots-0", "call.slots-1", "call")
    ]
    none, one, three = products
    assert (three - none) == 3 * (one - none) > 0, "each of three slots costs the same"


def test_a_program_for_no_adapter_reads_no_slot(flux):
    module = flux.modules["transformer"]
    program = module.programs["transformer.slots-0"]
    regions = {op.attrs["region"] for op in program.ops if op.name == REGION}
    assert regions == {name for name in module.regions if name.endswith(".slots-0")}
    for part in (program, *(module.regions[name] for name in regions)):
        assert not [name for name in part.weights if name.rpartition(".")[2] in (DOWN, UP, FACTORS)]


@pytest.mark.parametrize(
    ("adapters", "counts"),
    [
        ({"fewer": []}, []),
        ({"fewer": [2, 7]}, [2]),
        ({"rank": 1, "slots": 1, "include": ["*proj_out"]}, []),
    ],
    ids=["none is wanted", "another number", "the slots cost too little"],
)
def test_the_spec_chooses_the_numbers(adapters, counts, families):
    spec = slotted("flux", families)
    spec["runtime"]["adapters"] = {**spec["runtime"]["adapters"], **adapters}
    (calls,) = recorded(spec).calls
    assert list(narrowed_of(calls, "call")) == counts


def test_they_give_what_the_full_programs_give(families, tmp_path, monkeypatch):
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    spec = slotted("flux", families)
    with quiet_libraries():
        eager = DiffusionPipeline.from_pretrained(spec["source"]["model"])
    parts = {"transformer": eager.transformer}
    with diffkiln.load(diffkiln.compile(spec, tmp_path / "bundle").path) as pipe:
        for index, name in enumerate(("one", "two")):
            pipe.load_lora(adapter_of(tmp_path / f"{name}.safetensors", parts, ("to_q", "to_out.0"), seed=index), name)
        ran: list[str] = []
        call = pipe.executor._call
        monkeypatch.setattr(pipe.executor, "_call", lambda program: (ran.append(program.name), call(program))[1])
        mixes: list[dict[str, float]] = [{}, {"one": 1.0}, {"two": -0.5}, {"one": 0.5, "two": 1.0}, {"one": 0.0}]
        few = [drawn(pipe, spec, adapters=mix) for mix in mixes]
        assert [name.rpartition("call")[2] for name in ran] == [".slots-0", ".slots-1", ".slots-1", "", ".slots-0"]
        monkeypatch.setattr(type(pipe.variants[0]), "narrowed", lambda *_: {})
        for mix, picture in zip(mixes, few, strict=True):
            assert float((drawn(pipe, spec, adapters=mix) - picture).abs().max()) < 1e-6, mix
        assert torch.equal(drawn(pipe, spec, adapters={}), few[0]), "nothing was added but zeros"


@pytest.mark.more
def test_a_bundle_as_diffusers_has_the_full_blocks(families, tmp_path):
    spec = slotted("flux", families, passes=[{"name": "compile", "component": "transformer"}])
    bundle = diffkiln.compile(spec, tmp_path / "bundle").path
    with quiet_libraries():
        whole = diffkiln.load(bundle, as_diffusers=True)
    for block in (*whole.transformer.transformer_blocks, *whole.transformer.single_transformer_blocks):
        ((region, *_),) = block.forward._ways
        assert region.name in ("FluxTransformerBlock", "FluxSingleTransformerBlock")
    with diffkiln.load(bundle) as pipe:
        assert len(pipe.executor.engines) == 6
        assert float((drawn(whole, spec) - drawn(pipe, spec)).abs().max()) < 1e-5


# -- programs written by hand --


def line(*ops: Op, types: dict[str, TensorType]) -> Recording:
    """A component of one program, whose layer `l` has two slots of rank three, and a call of it."""
    slots = {
        "@l.slot_down": TensorType("float32", (1, 2, 3, 4)),
        "@l.slot_up": TensorType("float32", (4, 2, 3)),
        "@l.slot_factors": TensorType("float32", (2, 6)),
    }
    body = Program("c", (Input("%x", X),), ops, ops[-1].results, {"%x": X, **slots, **types})
    call = Op(CALL, (Ref("%latents"),), ("%out",), attrs={"component": "c", "program": "c"})
    source = {"kind": "tensor", "keyword": "latents"}
    out = types[ops[-1].outputs[0]]
    main = Program("call", (Input("%latents", X, source),), (call,), (Ref("%out"),), {"%latents": X, "%out": out})
    return Recording([{"call": main}], {"c": Module("c", {"c": body})}, Constants(), [{}])


def layer() -> list[Op]:
    """What a layer with slots adds to its own result, `%added`."""
    return [
        Op("aten.flatten.using_ints", (Ref("@l.slot_down"), 0, 2), ("%down",)),
        Op("aten.flatten.using_ints", (Ref("@l.slot_up"), 1), ("%up",)),
        Op("aten.linear.default", (Ref("%x"), Ref("%down")), ("%inner",)),
        Op("aten.mul.Tensor", (Ref("%inner"), Ref("@l.slot_factors")), ("%scaled",)),
        Op("aten.linear.default", (Ref("%scaled"), Ref("%up")), ("%added",)),
    ]


LAYER = {
    "%down": TensorType("float32", (6, 4)),
    "%up": TensorType("float32", (4, 6)),
    "%inner": TensorType("float32", (2, 6)),
    "%scaled": TensorType("float32", (2, 6)),
    "%added": X,
}


@pytest.mark.parametrize(
    ("last", "type_", "left"),
    [
        (Op("aten.add.Tensor", (Ref("%x"), Ref("%added")), ("%y",)), X, []),
        (Op("aten.add.Tensor", (Ref("%added"), Ref("%x")), ("%y",)), X, []),
        (Op("aten.add.Tensor", (Ref("%x"), Ref("%added")), ("%y",), {"alpha": 2}), X, None),
        (Op("aten.add.Tensor", (Ref("@small"), Ref("%added")), ("%y",)), X, None),
        (Op("aten.sub.Tensor", (Ref("%added"), Ref("%x")), ("%y",)), X, None),
        (Op("aten.linear.default", (Ref("%added"), Ref("@w"), Ref("@small")), ("%y",)), X, None),
    ],
    ids=["a sum", "the other way round", "a factor", "a sum that broadcasts", "a difference", "a bias"],
)
def test_zeros_are_left_out_where_they_only_add(last, type_, left):
    ops = [*layer(), last]
    recording = line(*ops, types={**LAYER, "@small": SMALL, "@w": TensorType("float32", (4, 4)), "%y": type_})
    found = narrowed(recording, "c", 0, 1.0)
    if left is None:
        assert found is recording, "nothing could be left out"
    else:
        program = found.modules["c"].programs["c.slots-0"]
        assert (list(program.ops), program.outputs) == (left, (Ref("%x"),))
        assert list(found.calls[0]) == ["call", "call.slots-0"]


def test_what_needs_all_slots_is_said():
    whole = Op("aten.reshape.default", (Ref("%scaled"), (2, 6)), ("%y",))
    recording = line(*layer()[:4], whole, types={**LAYER, "%y": TensorType("float32", (2, 6))})
    with pytest.raises(ValueError, match=r"its programs cannot leave slots out: .*reshape"):
        narrowed(recording, "c", 1, 1.0)


def test_names_that_are_taken_get_a_number():
    assert named_for("block", 1, ["block"]) == "block.slots-1"
    assert named_for("block", 1, ["block.slots-1", "block.slots-1.2"]) == "block.slots-1.3"


def test_a_bundle_says_which_program_they_replace():
    recording = line(*layer(), Op("aten.add.Tensor", (Ref("%x"), Ref("%added")), ("%y",)), types={**LAYER, "%y": X})
    program = narrowed(recording, "c", 0, 1.0).modules["c"].programs["c.slots-0"]
    again = program_from_json(program_to_json(program))
    assert (again.slots, again.instead_of) == (program.slots, program.instead_of) == (0, "c")
    with pytest.raises(ManifestInvalid, match="not a program"):
        program_from_json(program_to_json(program) | {"slots": "none"})
