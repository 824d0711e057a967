"""What is computed ahead has the bits that the loop gave, for every kind of pipeline, with another prompt and seed.
In a batch for all steps it differs by rounding."""

from __future__ import annotations

import pytest
import torch

from tests.passes.hoisting.replays import hoisting, recorded
from tests.pipelines import WARNING_FILTERS

pytestmark = [pytest.mark.filterwarnings(text) for text in WARNING_FILTERS]

#: Modulation by timestep and pooled prompt; attention to a prompt; a U-Net; joint blocks; an approximator.
FIRST = ("flux", "pixart_sigma", "sdxl", "qwen_image", "chroma")
#: The same for more ways in which models are made; `make test-more`.
MORE = (
    *("animate_diff", "auraflow", "cogvideox", "cogview4", "deepfloyd_if", "dit", "hunyuan_dit", "hunyuan_video"),
    *("ltx", "lumina2", "sd", "sd3", "svd", "wan", "z_image"),
)
#: The same for all others; `make test-long`.
LONG = (
    *("cogview3_plus", "ddim", "easy_animate", "ernie_image", "flux2", "flux2_klein_kv", "flux_controlnet"),
    *("flux_kontext", "i2vgen_xl", "kandinsky", "kandinsky22", "kandinsky3", "latte", "lcm", "longcat_image", "lumina"),
    *("mochi", "motif_video", "ovis_image", "pixart_sigma_pag", "prx", "qwen_image_edit", "sana", "sd3_controlnet"),
    *("sd_controlnet", "sd_img2img", "sd_inpaint", "sd_pag", "sdxl_controlnet", "sdxl_pag", "skyreels_v2"),
    *("stable_audio", "wan_i2v", "wan_vace"),
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return tmp_path_factory.mktemp("hoisting")


def _same(name, folders):
    made = recorded(name, folders)
    wanted = made.draws(made.recording)
    assert torch.equal(made.draws(made.rewritten(*hoisting(made, batch=False))), wanted)
    torch.testing.assert_close(made.draws(made.rewritten(*hoisting(made))), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", FIRST)
def test_hoisting_changes_no_bit(name, folders):
    _same(name, folders)


@pytest.mark.parametrize(
    "name",
    [
        *(pytest.param(name, marks=pytest.mark.more) for name in MORE),
        *(pytest.param(name, marks=pytest.mark.long) for name in LONG),
    ],
)
def test_hoisting_changes_no_bit_of_other_families(name, folders):
    _same(name, folders)
