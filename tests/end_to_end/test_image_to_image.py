"""A bundle that starts from an image, on a machine that serves."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import diffkiln
from diffkiln.interpreter.quiet import quiet_libraries
from tests.conftest import DIGITS
from tests.end_to_end.processes import draw
from tests.exporters.regions import engine_cache

SPEC = DIGITS / "spec-image-to-image.json"
PROMPTS = [f"a handwritten {word}" for word in ("nine", "zero", "three", "seven", "one", "six", "two", "four")]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return diffkiln.compile(SPEC, tmp_path_factory.mktemp("redrawn") / "bundle", cache=engine_cache()).path


@pytest.fixture(scope="module")
def seven():
    """What the example draws of a seven, as diffusers does."""
    sys.path.insert(0, str(DIGITS))
    import evaluate_eager

    yield evaluate_eager.load()(
        "a handwritten seven", generator=torch.Generator().manual_seed(7), **evaluate_eager.CALL
    )
    sys.path.remove(str(DIGITS))


@pytest.fixture(scope="module")
def eager(seven):
    from diffusers import FluxImg2ImgPipeline

    with quiet_libraries():
        pipe = FluxImg2ImgPipeline.from_pretrained(DIGITS / "model")
    pipe.set_progress_bar_config(disable=True)
    inputs = json.loads(SPEC.read_text())["inputs"]
    given = {key: value for key, value in (inputs | inputs["call"]).items() if key not in ("call", "batch_size")}
    given["image"] = seven.images[0]
    return np.concatenate(
        [
            pipe(prompt, generator=torch.Generator().manual_seed(seed), output_type="np", **given).images
            for seed, prompt in enumerate(PROMPTS)
        ]
    )


def test_an_image_is_redrawn_without_diffusers(bundle, seven, eager, production, tmp_path):
    seven.images[0].save(tmp_path / "seven.png")
    job = {
        "bundle": bundle,
        "requests": [[prompt, seed] for seed, prompt in enumerate(PROMPTS)],
        "images": {"image": tmp_path / "seven.png"},
        "out": tmp_path / "out.npy",
    }
    told = draw(job, production)
    images = np.load(tmp_path / "out.npy")
    assert np.abs(images - eager).max() <= 2 / 255
    assert told["engine_calls"] > 0
    assert not {"diffusers", "transformers"} & set(told["modules"])
    from classifier import as_digits

    assert not np.allclose(as_digits(images)[0], as_digits(np.asarray(seven.images[0])[None] / 255.0)[0])


def test_the_image_decides_what_is_drawn(bundle, seven):
    """The same words and noise on another image give another digit's strokes."""
    with diffkiln.load(bundle) as pipe:
        blank = Image.new("RGB", (32, 32))
        drawn = [
            pipe("a handwritten nine", image=image, generator=torch.Generator().manual_seed(1), output_type="pt").images
            for image in (seven.images[0], blank)
        ]
    assert (drawn[0] - drawn[1]).abs().max() > 0.1
