"""vae: decoding in slices and tiles is diffusers' own, recorded."""

from __future__ import annotations

import pytest
import torch

import diffkiln
from diffkiln.errors import IllegalPlan, SpecError
from diffkiln.interpreter.layers import decode_in_parts
from diffkiln.interpreter.portable import portable
from diffkiln.interpreter.quiet import quiet_libraries
from tests.passes.test_cache_schedule import draw, eager, spec
from tests.pipelines import WARNING_FILTERS

pytestmark = [pytest.mark.filterwarnings(text) for text in WARNING_FILTERS]


def with_vae(root, family: str, batch: int = 1, **options) -> dict:
    made = spec(root, family) | {"passes": [{"name": "vae", "component": "vae", **options}]}
    made["inputs"] |= {"num_inference_steps": 2} | ({"batch_size": batch} if batch > 1 else {})
    return made


@pytest.mark.parametrize(("family", "tile"), [("flux", 32), ("cogvideox", 32)])
def test_tiles_are_diffusers_tiles(family, tile, families, tmp_path):
    made = with_vae(families, family, tiling=True, tile=tile)
    if "num_frames" in made["inputs"]:
        made["inputs"]["num_frames"] = 1
    built = diffkiln.compile(made, tmp_path / "bundle")
    pipe = eager(made)
    plain = draw(pipe, made)
    decode_in_parts(pipe.vae, False, True, tile)
    wanted = draw(pipe, made)
    assert not torch.equal(wanted, plain)
    with diffkiln.load(built.path) as compiled:
        assert torch.equal(draw(compiled, made), wanted)
    with quiet_libraries(), portable():
        again = diffkiln.load(built.path, as_diffusers=True)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(draw(again, made), wanted)


def test_slices_give_the_same_images(families, tmp_path):
    made = with_vae(families, "flux", batch=2, slicing=True)
    built = diffkiln.compile(made, tmp_path / "bundle")
    del made["inputs"]["batch_size"]
    wanted = draw(eager(made), made, prompt=["a fox", "a hen"])
    with diffkiln.load(built.path) as compiled:
        assert float((draw(compiled, made, prompt=["a fox", "a hen"]) - wanted).abs().max()) <= 1e-5


@pytest.mark.parametrize(
    ("options", "where", "reason"),
    [
        ({"tiling": True, "tile": 4096}, "$.passes[0].tiling", "there would be one tile"),
        ({"tiling": True, "tile": 24}, "$.passes[0].tile", "do not overlap by whole latents"),
        ({"slicing": True}, "$.passes[0].slicing", "one image at a time"),
        ({"component": "transformer", "tiling": True}, "$.passes[0]", "no enable_tiling"),
    ],
)
def test_what_would_do_nothing_is_refused(options, where, reason, families):
    with pytest.raises(IllegalPlan) as caught:
        diffkiln.check(with_vae(families, "flux", **options))
    assert [problem.where for problem in caught.value.problems] == [where]
    assert reason in str(caught.value)


@pytest.mark.parametrize(("options", "where"), [({}, "tiling"), ({"slicing": True, "tile": 64}, "tile")])
def test_wrong_options_are_refused_by_path(options, where, families):
    with pytest.raises(SpecError, match=rf"\$\.passes\[0\]\.{where}"):
        diffkiln.check(with_vae(families, "flux", **options))
