"""What is added to a weight, by its form, and where the weight lies."""

from __future__ import annotations

import pytest
import torch

from diffkiln.bundle import open_bundle
from diffkiln.errors import CallError
from diffkiln.interpreter.layers import FourBit, Int4
from diffkiln.runtime.adapters.adding import Change, patches_of
from diffkiln.runtime.adapters.targets import FLOAT8, FOUR_BITS, INT8, PLAIN, Target
from diffkiln.runtime.weights import WeightStore
from tests.pipelines import WARNING_FILTERS
from tests.runtime.adapters.files import drawn
from tests.simulated import Simulated

pytestmark = [pytest.mark.filterwarnings(text) for text in WARNING_FILTERS]


def change(target: Target, rank: int = 4, rows: slice | None = None, bias: bool = False) -> Change:
    generator = torch.Generator().manual_seed(rank)
    rows = rows or slice(0, target.shape[0])
    count, inputs = rows.stop - rows.start, torch.Size(target.shape[1:]).numel()
    added = drawn((count,), generator, 1.0) if bias else None
    return Change(target, rows, drawn((rank, inputs), generator, 0.3), drawn((count, rank), generator, 0.3), added, 0.5)


def applied(tensors: dict[str, torch.Tensor], *mix: tuple[float, Change]) -> dict[str, torch.Tensor]:
    made = {name: tensor.clone() for name, tensor in tensors.items()}
    for _, patch in patches_of(mix):
        patch.apply(made)
    return made


def test_bfloat16_is_rounded_once():
    target = Target("t", "a", PLAIN, "a.weight", (16, 8))
    weight = torch.randn(16, 8).bfloat16()
    one, two = change(target, 4), change(target, 2)
    found = applied({"a.weight": weight}, (0.5, one), (-1.0, two))["a.weight"]
    wanted = weight.double() + 0.25 * one.up.double() @ one.down.double() - 0.5 * two.up.double() @ two.down.double()
    assert torch.equal(found, wanted.bfloat16()) or (found.double() - wanted).abs().max() < 2**-7


def test_a_convolution_with_its_channels_last():
    target = Target("t", "a", PLAIN, "a.weight", (6, 4, 3, 3))
    weight = torch.randn(6, 3, 3, 4).permute(0, 3, 1, 2)
    added = change(target)
    found = applied({"a.weight": weight}, (1.0, added))["a.weight"]
    torch.testing.assert_close(found, weight + (0.5 * added.up @ added.down).reshape(6, 4, 3, 3))


def test_a_bias_in_the_rows_of_a_fused_one():
    target = Target("t", "a", PLAIN, "a.weight", (12, 8), bias="a.bias", part=(1, 3))
    tensors = {"a.weight": torch.randn(12, 8), "a.bias": torch.randn(12)}
    added = change(target, rows=slice(4, 8), bias=True)
    found = applied(tensors, (2.0, added))
    torch.testing.assert_close(found["a.bias"][4:8], tensors["a.bias"][4:8] + added.bias)
    assert torch.equal(found["a.bias"][:4], tensors["a.bias"][:4])
    assert torch.equal(found["a.weight"][8:], tensors["a.weight"][8:])


@pytest.mark.parametrize("columns", [(16, 1), (16,)], ids=["a column", "a vector"])
def test_int8_is_rounded_again_within_half_a_step(columns):
    target = Target("t", "a", INT8, "a.weight.qdata", (16, 8), scale="a.weight.scale")
    scale = torch.rand(columns) * 0.01 + 0.01
    tensors = {"a.weight.qdata": torch.randint(-127, 128, (16, 8), dtype=torch.int8), "a.weight.scale": scale}
    added = change(target)
    found = applied(tensors, (1.0, added))
    new = found["a.weight.scale"].reshape(-1, 1)
    whole = tensors["a.weight.qdata"].float() * scale.reshape(-1, 1) + 0.5 * added.up @ added.down
    assert ((found["a.weight.qdata"].float() * new - whole).abs() <= new * 0.5001).all()
    torch.testing.assert_close(new, whole.abs().amax(1, keepdim=True) / 127)


def test_float8_is_rounded_again():
    target = Target("t", "a", FLOAT8, "a.weight_data", (16, 8))
    weight = torch.randn(16, 8).to(torch.float8_e4m3fn)
    added = change(target)
    found = applied({"a.weight_data": weight}, (1.0, added))["a.weight_data"].float()
    wanted = weight.float() + 0.5 * added.up @ added.down
    assert ((found - wanted).abs() <= wanted.abs() / 16 + 2**-10).all()


def test_a_layer_that_nothing_reads_needs_no_patch():
    target = Target("t", "a", PLAIN, "a.weight", (16, 8), used=False)
    assert not patches_of([(1.0, change(target))])


@pytest.mark.parametrize("to", ["host", None], ids=["pinned", "resident"])
def test_weights_of_a_gpu_are_written_where_they_stay(bundle, to):
    """In its memory, or in the host memory that it copies from; and back to the bit."""
    with open_bundle(bundle) as opened, opened.verify() as verified:
        device = Simulated()
        offload = None if to is None else {"use_stream": True, "to": to}
        store = WeightStore(verified, verified.manifest.weights, device.device, offload, on=device)
        name = "transformer_blocks.0.attn.to_qkv.weight"
        key = store.key_of("transformer", name)

        def now() -> torch.Tensor:
            cursor = store.follow([key])
            tensor = cursor.enter(key)[name]
            device.finish()
            found = tensor.clone()
            cursor.close()
            return found

        before = now()
        added = change(Target("transformer", name.removesuffix(".weight"), PLAIN, name, tuple(before.shape)))
        store.patch({key: [patch for _, patch in patches_of([(1.0, added)])]})
        torch.testing.assert_close(now(), before + 0.5 * added.up @ added.down)
        store.patch({})
        assert torch.equal(now(), before)
        store.close()


def test_quantized_layers_are_refused_unless_asked_for(families, tmp_path):
    import diffkiln
    from tests.pipelines import FAMILIES, build_folder
    from tests.runtime.adapters.conftest import CALL, changed, weights
    from tests.runtime.adapters.files import adapter_of

    spec = {
        "spec_version": 1,
        "source": {"model": str(build_folder("flux", families))},
        "target": {"device": "cpu"},
        "inputs": CALL | {"call": {"max_sequence_length": 32}},
        "passes": [{"name": "quantize", "component": "transformer", "type": "int8_weight_only"}],
    }
    built = diffkiln.compile(spec, tmp_path / "bundle")
    module = FAMILIES["flux"].build().transformer
    file = adapter_of(tmp_path / "style.safetensors", {"transformer": module}, ("to_q",))
    with diffkiln.load(built.path) as pipe:
        before = weights(pipe)
        with pytest.raises(CallError, match=r"stored as int8. requantize=True .*half a step.*unquantized"):
            pipe.load_lora(file)
        assert not changed(before, weights(pipe))
        pipe.load_lora(file, requantize=True)
        touched = changed(before, weights(pipe))
        assert {name.rpartition(".weight.")[2] for name in touched} == {"qdata", "scale"}
        pipe.unload_lora("style")
        assert not changed(before, weights(pipe))


@pytest.mark.parametrize("fused", [False, True])
def test_int4_is_rounded_again_within_half_a_step_in_its_rows_alone(fused):
    storage = Int4(8)
    rows = slice(4, 8) if fused else slice(0, 12)
    target = Target("t", "a", FOUR_BITS, "a.weight_data", (12, 16), part=(1, 3) if fused else None, storage=storage)
    tensors = {
        "a.weight_data": torch.randint(0, 256, (12, 8), dtype=torch.uint8),
        "a.weight_scale": torch.rand(12, 2) * 0.01 + 0.01,
    }
    added = change(target, rows=rows)
    found = applied(tensors, (1.0, added))
    before, after = (
        storage.restore({"data": each["a.weight_data"], "scale": each["a.weight_scale"]}, (12, 16), torch.float32)
        for each in (tensors, found)
    )
    wanted = before.clone()
    wanted[rows] += 0.5 * added.up @ added.down
    largest = wanted.reshape(12, 2, 8).abs().amax(-1, keepdim=True)
    moved = (after - wanted).reshape(12, 2, 8).abs()
    assert (moved[rows] <= largest[rows] / 14 * 1.001).all()
    others = [row for row in range(12) if row not in range(*rows.indices(12))]
    assert torch.equal(after[others], before[others])


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
def test_four_bits_of_bitsandbytes_are_rounded_again(kind, nested):
    functional = pytest.importorskip("bitsandbytes.functional")
    storage, shape = FourBit(nested=nested), (24, 20)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.1
    packed, state = functional.quantize_4bit(weight, blocksize=64, compress_statistics=nested, quant_type=kind)
    tensors = {"a.weight_data": packed.reshape(-1), "a.weight_table": state.code, "a.weight_absmax": state.absmax}
    if nested:
        tensors |= {
            "a.weight_absmax_table": state.state2.code,
            "a.weight_absmax_scale": state.state2.absmax,
            "a.weight_absmax_offset": state.offset,
        }

    def whole(held: dict[str, torch.Tensor]) -> torch.Tensor:
        parts = {name.removeprefix("a.weight_"): tensor for name, tensor in held.items()}
        return storage.restore(parts, shape, torch.float32)

    target = Target("t", "a", FOUR_BITS, "a.weight_data", (480,), storage=storage).within(20)
    assert target.shape == shape
    added = change(target, rank=2, rows=slice(0, 24))
    still = applied(tensors, (1e-30, added))
    torch.testing.assert_close(whole(still), whole(tensors), rtol=1e-5, atol=1e-6)
    found, wanted = applied(tensors, (1.0, added)), whole(tensors) + 0.5 * added.up @ added.down
    largest = torch.nn.functional.pad(wanted.reshape(-1), (0, 32)).reshape(8, 64).abs().amax(-1)
    moved = torch.nn.functional.pad((whole(found) - wanted).reshape(-1), (0, 32)).reshape(8, 64).abs().amax(-1)
    assert (moved <= largest * (1 / 6 + (0.02 if nested else 0.001))).all()
    again = functional.quantize_4bit(wanted, blocksize=64, compress_statistics=nested, quant_type=kind)
    theirs = functional.dequantize_4bit(*again)
    assert float((theirs - wanted).norm() / (whole(found) - wanted).norm()) == pytest.approx(1, abs=0.02)


def test_numbers_in_one_row_have_a_shape_once_the_inputs_are_known():
    flat = Target("t", "a", FOUR_BITS, "a.weight_data", (480,), storage=FourBit())
    assert flat.within(20).rows(24) == slice(0, 24)
    assert flat.within(20).rows(12) is None
    assert flat.within(7) is flat
