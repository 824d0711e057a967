"""Adapters in slots: what diffusers' own `load_lora_weights` and `set_adapters` give, also beside quantized weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

import diffkiln
from diffkiln.errors import CallError
from diffkiln.interpreter.quiet import quiet_libraries
from tests.end_to_end.test_adapters import BLOCKS, FUSED, GROUP, ROUNDING, drawn, spec_of
from tests.end_to_end.test_adapters import adapters as merged_adapters
from tests.pipelines import WARNING_FILTERS
from tests.runtime.adapters.files import adapter_of

pytestmark = [
    *(pytest.mark.filterwarnings(text) for text in WARNING_FILTERS),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning:peft"),
    pytest.mark.more,
]
MIXES: list[dict[str, float]] = [
    {"one": 1.0},
    {"one": 0.5, "two": -1.0, "three": 1.0},
    {"one": 0.0, "two": 0.5},
    {},
]
ROOM = {"rank": 6, "slots": 3}


def slotted(name: str, root: Path, offload: Any = None, **more: Any) -> dict[str, Any]:
    spec = spec_of(name, root, offload)
    spec["runtime"]["adapters"] = ROOM
    return spec | more


def component_of(name: str) -> str:
    return "unet" if name == "sdxl" else "transformer"


def adapters(pipe: Any, folder: Path, component: str) -> dict[str, Path]:
    """Three adapters of linear layers of the denoiser; the second one has alphas."""
    parts = {component: getattr(pipe, component)}
    # diffusers' scales by block know no layer of a U-Net that is outside of blocks.
    outside = () if component == "unet" else ("linear_1",)
    return {
        "one": adapter_of(folder / "one.safetensors", parts, ("to_q", "to_k", "to_v", "add_k_proj"), seed=1),
        "two": adapter_of(
            folder / "two.safetensors", parts, ("to_out.0", "to_q", "proj_mlp"), seed=2, rank=2, alpha=3.0
        ),
        "three": adapter_of(folder / "three.safetensors", parts, ("to_v", "net.2", *outside), seed=3, rank=6),
    }


def compare(pipe: Any, eager: Any, spec: Any, files: dict[str, Path], mixes: list[dict[str, float]]) -> None:
    plain = drawn(pipe, spec)
    for label, file in files.items():
        eager.load_lora_weights(file.parent, weight_name=file.name, adapter_name=label)
        pipe.load_lora(file, name=label, scale=0)
    assert torch.equal(drawn(pipe, spec), plain)
    mixed = []
    for mix in mixes:
        with quiet_libraries():
            eager.enable_lora() if mix else eager.disable_lora()
            if mix:
                eager.set_adapters(list(mix), list(mix.values()))
        pipe.set_adapters(mix)
        mixed.append(drawn(pipe, spec))
        assert float((drawn(eager, spec) - mixed[-1]).abs().max()) < ROUNDING, mix
        if any(mix.values()):
            assert float((mixed[-1] - plain).abs().max()) > 100 * ROUNDING, "the adapters change the picture"
    assert torch.equal(drawn(pipe, spec, adapters=mixes[1]), mixed[1]), "in, out, and in again: to the bit"
    for label in files:
        pipe.unload_lora(label)
    assert torch.equal(drawn(pipe, spec), plain)


@pytest.mark.parametrize("offload", [None, GROUP], ids=["resident", "offloaded"])
@pytest.mark.parametrize("name", list(FUSED))
def test_slots_give_what_diffusers_gives(name, offload, families, tmp_path):
    from diffusers import DiffusionPipeline

    spec = slotted(name, families, offload)
    with quiet_libraries():
        eager = DiffusionPipeline.from_pretrained(spec["source"]["model"])
        eager.set_progress_bar_config(disable=True)
    files = adapters(eager, tmp_path, component_of(name))
    with diffkiln.load(diffkiln.compile(spec, tmp_path / "bundle").path) as pipe:
        compare(pipe, eager, spec, files, MIXES)
        if name in BLOCKS:
            theirs, ours = BLOCKS[name]
            pipe.load_lora(files["one"], name="one", scale=0)
            with quiet_libraries():
                eager.enable_lora()
                eager.set_adapters(["one"], [theirs])
            assert float((drawn(eager, spec) - drawn(pipe, spec, adapters={"one": ours})).abs().max()) < ROUNDING


@pytest.mark.parametrize(
    "quantize",
    [
        {"backend": "torchao", "type": "int8_weight_only"},
        {"backend": "bitsandbytes", "type": "nf4"},
    ],
    ids=lambda options: options["type"],
)
def test_slots_beside_quantized_weights_give_what_peft_gives_beside_them(quantize, families, tmp_path):
    from diffusers import DiffusionPipeline

    quantized = {"name": "quantize", "component": "transformer"} | quantize
    spec = slotted("flux", families, passes=[quantized])
    without = spec | {"runtime": {}}
    with quiet_libraries():
        stored = diffkiln.load(diffkiln.compile(without, tmp_path / "without").path, as_diffusers=True)
        eager = DiffusionPipeline.from_pretrained(spec["source"]["model"])
        eager.set_progress_bar_config(disable=True)
    for name, layer in stored.transformer.named_modules():
        if isinstance(layer, torch.nn.Linear):
            weight = layer.weight.dequantize() if is_traceable_wrapper_subclass(layer.weight) else layer.weight
            eager.transformer.get_submodule(name).weight.data.copy_(weight)
    files = adapters(eager, tmp_path, "transformer")
    with diffkiln.load(diffkiln.compile(spec, tmp_path / "bundle").path) as pipe:
        compare(pipe, eager, spec, files, MIXES)
        plain = drawn(pipe, spec)
        with pytest.raises(CallError, match=r"requantize=True adds .*half a step.*or these layers unquantized"):
            pipe.load_lora(files["one"], merged=True)
        pipe.load_lora(files["one"], merged=True, requantize=True)
        rounded = drawn(pipe, spec)
        eager.enable_lora()
        eager.set_adapters(["one"], [1.0])
        exact = drawn(eager, spec)
        assert float((rounded - exact).norm()) < 0.7 * float((plain - exact).norm()), "nearer than without"
        pipe.unload_lora("one")
        assert torch.equal(drawn(pipe, spec), plain)


@pytest.mark.parametrize("name", ["flux", "sdxl", "wan"])
def test_rows_with_adapters_of_their_own_are_as_if_alone(name, families, tmp_path):
    from diffusers import DiffusionPipeline

    spec = slotted(name, families)
    spec["inputs"]["batch_size"] = 2
    with quiet_libraries():
        eager = DiffusionPipeline.from_pretrained(spec["source"]["model"])
    files = adapters(eager, tmp_path, component_of(name))
    call = {**spec["inputs"]}
    given = call.pop("call") | call
    given.pop("batch_size")

    def pictures(pipe: Any, adapters: Any) -> torch.Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
        prompts = ["A small red Fox", "A blue Owl"]
        made = pipe(prompts, generator=generators, output_type="pt", adapters=adapters, **given)
        return next(iter(made.values()))

    with diffkiln.load(diffkiln.compile(spec, tmp_path / "bundle").path) as pipe:
        for label, file in files.items():
            pipe.load_lora(file, name=label, scale=0)
        rows = [{"one": 1.0}, {"two": 0.5, "three": -1.0}]
        mixed, plain = pictures(pipe, rows), pictures(pipe, {})
        for index, mix in enumerate(rows):
            alone = pictures(pipe, mix)[index]  # where adapters may be in other slots
            assert float((mixed[index] - alone).abs().max()) < ROUNDING
            assert float((mixed[index] - plain[index]).abs().max()) > 100 * ROUNDING
        assert torch.equal(pictures(pipe, [{}, {"two": 1}])[0], plain[0])


def test_what_has_no_slot_is_added_to_the_weights_where_that_is_asked_for(families, tmp_path):
    from diffusers import DiffusionPipeline

    spec = slotted("sdxl", families)
    with quiet_libraries():
        eager = DiffusionPipeline.from_pretrained(spec["source"]["model"])
        eager.set_progress_bar_config(disable=True)
        one = adapters(eager, tmp_path, "unet")["one"]
        two = merged_adapters(eager, tmp_path / "merged")["two"]
        for label, file in (("one", one), ("two", two)):
            eager.load_lora_weights(file.parent, weight_name=file.name, adapter_name=label)
        eager.set_adapters(["one", "two"], [1.0, 0.5])
    with diffkiln.load(diffkiln.compile(spec, tmp_path / "bundle").path) as pipe:
        plain = drawn(pipe, spec)
        with pytest.raises(
            CallError, match=r"conv1 of unet, which two\.safetensors changes, has no slots.*merged=True"
        ):
            pipe.load_lora(two)
        pipe.load_lora(one)
        pipe.load_lora(two, scale=0.5, merged=True)
        assert float((drawn(eager, spec) - drawn(pipe, spec)).abs().max()) < ROUNDING
        pipe.set_adapters({})
        assert torch.equal(drawn(pipe, spec), plain)


def test_engines_take_slots_among_their_weights_and_nothing_is_compiled(families, tmp_path, monkeypatch):
    from diffusers import DiffusionPipeline

    fused = {"name": "fuse_qkv", "component": "transformer"}
    spec = slotted("flux", families, GROUP, passes=[fused, {"name": "compile", "component": "transformer"}])
    with quiet_libraries():
        eager = DiffusionPipeline.from_pretrained(spec["source"]["model"])
        eager.set_progress_bar_config(disable=True)
    files = adapters(eager, tmp_path, "transformer")
    bundle = diffkiln.compile(spec, tmp_path / "bundle").path
    cache = tmp_path / "cache"
    cache.mkdir()
    monkeypatch.setenv("PATH", str(cache))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(cache))
    with diffkiln.load(bundle) as pipe:
        assert pipe.executor.engines
        compare(pipe, eager, spec, files, MIXES)
    assert not list(cache.iterdir())


def test_layers_that_were_computed_ahead_are_refused(families, tmp_path):
    from diffusers import DiffusionPipeline

    spec = slotted("flux", families, passes=[{"name": "hoist", "component": "transformer"}])
    with quiet_libraries():
        eager = DiffusionPipeline.from_pretrained(spec["source"]["model"])
    parts = {"transformer": eager.transformer}
    with diffkiln.load(diffkiln.compile(spec, tmp_path / "bundle").path) as pipe:
        lacking = adapter_of(tmp_path / "timestep.safetensors", parts, ("timestep_embedder.linear_1", "to_q"))
        with pytest.raises(CallError, match=r"timestep_embedder\.linear_1"):
            pipe.load_lora(lacking)
        plain = drawn(pipe, spec)
        pipe.load_lora(adapter_of(tmp_path / "style.safetensors", parts, ("to_q",)))
        assert not torch.equal(drawn(pipe, spec), plain)
