"""Every family: the bundle's programs, replayed without engines, equal diffusers within rounding.

Bit for bit, where diffusers' constants are computed as the recorder computes them.
"""

from __future__ import annotations

import pytest
import torch

import diffkiln
from diffkiln.interpreter.portable import portable
from diffkiln.interpreter.quiet import quiet_libraries
from tests.pipelines import FAMILIES, WARNING_FILTERS, build_folder

#: Families whose denoiser is called at another length than by diffusers, so that its sums have another order.
PADDED = {"qwen_image", "z_image", "lumina2"}
#: The largest difference of a value of an image in [0, 1].
ROUNDING = 1e-5
#: The same where diffusers computes constants its own way, so that sigmas and rotary tables differ in their last bits.
LAST_BITS = 1e-4
pytestmark = [pytest.mark.filterwarnings(text) for text in WARNING_FILTERS]
_FIELDS = ("height", "width", "num_frames", "num_inference_steps", "guidance_scale")


def spec_of(name: str, root) -> dict:
    call = {key: value for key, value in FAMILIES[name].call.items() if "prompt" not in key or "num" in key}
    inputs = {key: call.pop(key) for key in _FIELDS if key in call} | {"call": call}
    source = {"model": str(build_folder(name, root))}
    return {"spec_version": 1, "source": source, "target": {"device": "cpu"}, "inputs": inputs}


#: Those that every run compiles; the others have programs in tests/coverage, and are for `make test-long`.
EACH_RUN = ("flux", "qwen_image", "sd", "sd3", "sdxl", "wan")


@pytest.mark.parametrize(
    "name", [name if name in EACH_RUN else pytest.param(name, marks=pytest.mark.long) for name in sorted(FAMILIES)]
)
def test_bundle_equals_diffusers(name, tmp_path):
    from diffusers import DiffusionPipeline

    spec = spec_of(name, tmp_path)
    built = diffkiln.compile(spec, tmp_path / "bundle")
    given = {key: value for key, value in spec["inputs"].items() if key != "call"} | spec["inputs"]["call"]

    def difference(pipe) -> float:
        with quiet_libraries(), torch.inference_mode():
            reference = DiffusionPipeline.from_pretrained(spec["source"]["model"])
            reference.set_progress_bar_config(disable=True)
            want, got = (
                each(prompt="A small red Fox", generator=torch.Generator().manual_seed(5), output_type="pt", **given)
                for each in (reference, pipe)
            )
        field = next(iter(want.keys()))
        return float((want[field] - got[field]).abs().max())

    with diffkiln.load(built.path) as pipe:
        with portable():
            assert difference(pipe) <= (ROUNDING if name in PADDED else 0.0)
        assert difference(pipe) <= LAST_BITS
