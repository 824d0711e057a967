"""Every family: the bundle's programs, replayed without engines, equal diffusers bit for bit or within rounding."""

from __future__ import annotations

import pytest
import torch

import diffkiln
from diffkiln.record.quiet import quiet_libraries
from tests.pipelines import FAMILIES, WARNING_FILTERS, build_folder

#: Families whose denoiser is called at another length than by diffusers, so that its sums have another order.
PADDED = {"qwen_image", "z_image", "lumina2"}
pytestmark = [pytest.mark.filterwarnings(text) for text in WARNING_FILTERS]
_FIELDS = ("height", "width", "num_frames", "num_inference_steps", "guidance_scale")


def spec_of(name: str, root) -> dict:
    call = {key: value for key, value in FAMILIES[name].call.items() if "prompt" not in key or "num" in key}
    inputs = {key: call.pop(key) for key in _FIELDS if key in call} | {"call": call}
    source = {"model": str(build_folder(name, root))}
    return {"spec_version": 1, "source": source, "target": {"device": "cpu"}, "inputs": inputs}


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_bundle_equals_diffusers(name, tmp_path):
    from diffusers import DiffusionPipeline

    spec = spec_of(name, tmp_path)
    built = diffkiln.compile(spec, tmp_path / "bundle")
    with quiet_libraries():
        reference = DiffusionPipeline.from_pretrained(spec["source"]["model"])
        reference.set_progress_bar_config(disable=True)
        given = {key: value for key, value in spec["inputs"].items() if key != "call"} | spec["inputs"]["call"]
        want = reference(
            prompt="A small red Fox", generator=torch.Generator().manual_seed(5), output_type="pt", **given
        )
    with diffkiln.load(built.path) as pipe:
        got = pipe("A small red Fox", generator=torch.Generator().manual_seed(5), output_type="pt", **given)
    field = next(iter(want.keys()))
    assert float((want[field] - got[field]).abs().max()) <= (1e-5 if name in PADDED else 0.0)
