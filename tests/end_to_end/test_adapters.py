"""Adapters at run time: what diffusers' own `load_lora_weights` and `set_adapters` give, and back to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import diffkiln
from diffkiln.interpreter.quiet import quiet_libraries
from tests.pipelines import FAMILIES, WARNING_FILTERS, build_folder
from tests.runtime.adapters.files import adapter_of

pytestmark = [
    *(pytest.mark.filterwarnings(text) for text in WARNING_FILTERS),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning:peft"),
]
#: Family → component of the denoiser, and whether diffusers can fuse its projections.
FUSED = {"flux": True, "sdxl": True, "sd3": False, "wan": True, "qwen_image": False}
GROUP = {"strategy": "group", "type": "block_level", "num_blocks_per_group": 1, "use_stream": True}
MIXES: list[dict[str, float]] = [
    {"one": 1.0},
    {"one": 0.5, "two": -1.0, "three": 1.0},
    {"one": 0.0, "two": 0.5},
    {},
]
#: Scales by block: diffusers' form, which there is for U-Nets, and the bundle's.
BLOCKS = {
    "sdxl": (
        {"unet": {"down": 0.5, "mid": -1.0, "up": {"block_0": [0.0, 2.0]}}},
        {
            "unet.down_blocks": 0.5,
            "unet.mid_block": -1.0,
            "unet.up_blocks.0.attentions.0": 0.0,
            "unet.up_blocks.0.attentions.1": 2.0,
        },
    )
}
ROUNDING = 1e-5


def spec_of(name: str, root: Path, offload: Any) -> dict[str, Any]:
    call = {key: value for key, value in FAMILIES[name].call.items() if "prompt" not in key or "num" in key}
    call["num_inference_steps"] = 1
    fields = ("height", "width", "num_frames", "num_inference_steps", "guidance_scale")
    inputs = {key: call.pop(key) for key in fields if key in call} | {"call": call}
    component = "unet" if name == "sdxl" else "transformer"
    passes = [{"name": "fuse_qkv", "component": component}] if FUSED[name] else []
    return {
        "spec_version": 1,
        "source": {"model": str(build_folder(name, root))},
        "target": {"device": "cpu"},
        "inputs": inputs,
        "passes": passes,
        "runtime": {"offload": offload} if offload else {},
    }


def drawn(pipe: Any, spec: dict[str, Any], **more: Any) -> torch.Tensor:
    inputs = {**spec["inputs"]}
    given = inputs.pop("call") | inputs | more
    with quiet_libraries(), torch.inference_mode():
        made = pipe(prompt="A small red Fox", generator=torch.Generator().manual_seed(5), output_type="pt", **given)
    return next(iter(made.values()))


def adapters(pipe: Any, folder: Path) -> dict[str, Path]:
    """Three adapters: of attention, of feed-forward layers with alphas, and of all with a text encoder."""
    name = "unet" if hasattr(pipe, "unet") else "transformer"
    parts = {name: getattr(pipe, name)}
    encoder = {"text_encoder": pipe.text_encoder} if "text_encoder" in type(pipe)._lora_loadable_modules else {}
    return {
        "one": adapter_of(folder / "one.safetensors", parts, ("to_q", "to_k", "to_v", "add_k_proj"), seed=1),
        "two": adapter_of(folder / "two.safetensors", parts, ("proj", "to_out.0", "conv1"), seed=2, rank=2, alpha=3.0),
        "three": adapter_of(folder / "three.safetensors", parts | encoder, ("v", "v_proj", "q_proj", "0"), seed=3),
    }


CASES = [("flux", GROUP), ("sdxl", None)]
REST = [(name, offload) for name in FUSED for offload in (None, GROUP) if (name, offload) not in CASES]


@pytest.mark.parametrize(
    ("name", "offload"),
    [*CASES, *(pytest.param(*case, marks=pytest.mark.more) for case in REST)],
    ids=lambda value: value if isinstance(value, str) else "offloaded" if value else "resident",
)
def test_a_bundle_with_adapters_gives_what_diffusers_gives(name, offload, families, tmp_path):
    from diffusers import DiffusionPipeline

    spec = spec_of(name, families, offload)
    with quiet_libraries():
        eager = DiffusionPipeline.from_pretrained(spec["source"]["model"])
        eager.set_progress_bar_config(disable=True)
        files = adapters(eager, tmp_path)
        for label, file in files.items():
            eager.load_lora_weights(file.parent, weight_name=file.name, adapter_name=label)
    built = diffkiln.compile(spec, tmp_path / "bundle")
    with diffkiln.load(built.path) as pipe:
        plain = mixed = drawn(pipe, spec)
        for label, file in files.items():
            pipe.load_lora(file, name=label, scale=0)
        assert torch.equal(drawn(pipe, spec), plain)
        for mix in MIXES:
            with quiet_libraries():
                eager.enable_lora() if mix else eager.disable_lora()
                if mix:
                    eager.set_adapters(list(mix), list(mix.values()))
            wanted = drawn(eager, spec)
            pipe.set_adapters(mix)
            found = drawn(pipe, spec)
            assert float((wanted - found).abs().max()) < ROUNDING, mix
            mixed = found if len(mix) == 3 else mixed
            if any(mix.values()):
                assert float((found - plain).abs().max()) > 100 * ROUNDING, "the adapters change the picture"
        if name in BLOCKS:
            theirs, ours = BLOCKS[name]
            with quiet_libraries():
                eager.enable_lora()
                eager.set_adapters(["one"], [theirs])
            found = drawn(pipe, spec, adapters={"one": ours})
            assert float((drawn(eager, spec) - found).abs().max()) < ROUNDING
            assert float((found - drawn(pipe, spec, adapters={"one": 1.0})).abs().max()) > 100 * ROUNDING
        assert torch.equal(drawn(pipe, spec, adapters=MIXES[1]), mixed), "in, out, and in again: to the bit"
        assert torch.equal(drawn(pipe, spec), plain), "a call's own adapters leave no trace"
        for label in files:
            pipe.unload_lora(label)
        assert torch.equal(drawn(pipe, spec), plain)
