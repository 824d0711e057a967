"""What is added to a weight, by its form, and where the weight lies."""

from __future__ import annotations

import pytest
import torch

from diffkiln.bundle import open_bundle
from diffkiln.errors import CallError
from diffkiln.runtime.adapters.adding import Change, patches_of
from diffkiln.runtime.adapters.targets import FLOAT8, INT8, PLAIN, Target
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
