"""The digits UNet: that it draws what it is asked for, and what passes for UNets and for guidance do to its digits."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch

import diffkiln
from tests.conftest import DIGITS
from tests.pipelines import WARNING_FILTERS

pytestmark = [pytest.mark.filterwarnings(text) for text in WARNING_FILTERS]
EXAMPLE = DIGITS.parent / "digits_unet"
MODEL = EXAMPLE / "model"

HALF = {"name": "guidance", "component": "unet", "steps": [1] * 5 + [0] * 5}
DEEP = {"name": "cache_schedule", "component": "unet", "method": "deepcache", "interval": 2}
#: Passes, and the PSNR that their pictures keep at least against those without, by benchmarks/results/unet.md.
PASSES = {
    "deepcache": ([DEEP], 28),
    "merge_tokens": ([{"name": "merge_tokens", "component": "unet", "ratio": 0.5}], 32),
    "guidance_steps": ([HALF], 25),
}


@pytest.fixture(scope="module", autouse=True)
def classifier():
    """The judge of ../digits, whose files import each other by name, as scripts do."""
    sys.path.insert(0, str(DIGITS))
    import classifier

    yield classifier
    sys.path.remove(str(DIGITS))
    for name in ("classifier", "styles"):
        sys.modules.pop(name, None)


def spec(passes=(), pipeline: str | None = None, **call) -> dict:
    """The example's spec with these passes, replayed without engines."""
    made = json.loads((EXAMPLE / "spec.json").read_text())
    made["source"] |= {"pipeline": pipeline} if pipeline else {}
    made["inputs"]["call"] |= call
    return made | {"passes": list(passes), "runtime": {}}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed)


def drawn(pipe, wanted, **call) -> np.ndarray:
    """float32 [n, height, width, 3] from 0 to 1."""
    images = [pipe(item.prompt, generator=seeded(item.seed), output_type="np", **call).images for item in wanted]
    return np.concatenate(images)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The pipeline without passes."""
    built = diffkiln.compile(spec(), tmp_path_factory.mktemp("unet") / "plain", base=EXAMPLE)
    with diffkiln.load(built.path) as pipe:
        yield pipe


def test_the_folder_is_small_and_holds_json_and_safetensors_only():
    files = [path for path in EXAMPLE.rglob("*") if path.is_file() and path.suffix not in (".pyc", ".py", ".md")]
    assert sum(path.stat().st_size for path in files) <= 6_000_000
    assert {path.suffix for path in files} == {".json", ".safetensors"}


def test_its_text_encoder_and_autoencoder_are_those_of_the_other_example():
    for name in ("text_encoder/model", "vae/diffusion_pytorch_model"):
        assert (MODEL / f"{name}.safetensors").read_bytes() == (DIGITS / "model" / f"{name}.safetensors").read_bytes()


def test_the_spec_is_legal():
    plan = diffkiln.check(EXAMPLE / "spec.json")
    assert plan.source.class_name == "StableDiffusionPipeline"
    assert plan.compiled == {"unet"}


def test_eager_diffusers_draws_what_it_is_asked_for(classifier):
    from diffusers import StableDiffusionPipeline

    inputs = json.loads((EXAMPLE / "spec.json").read_text())["inputs"]
    fixed = {name: inputs[name] for name in ("height", "width", "num_inference_steps", "guidance_scale")}
    pipe = StableDiffusionPipeline.from_pretrained(MODEL, local_files_only=True, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    wanted = classifier.requests(20)
    generators = [seeded(item.seed) for item in wanted]
    images = pipe([item.prompt for item in wanted], generator=generators, output_type="np", **fixed).images
    assert classifier.score(images, [item.digit for item in wanted]) >= 0.95


@pytest.mark.more
@pytest.mark.parametrize("name", PASSES)
def test_digits_stay_readable_with(name, plain, classifier, tmp_path):
    passes, least = PASSES[name]
    wanted = classifier.requests(20)
    built = diffkiln.compile(spec(passes), tmp_path / "bundle", base=EXAMPLE)
    with diffkiln.load(built.path) as pipe:
        images = drawn(pipe, wanted)
    assert classifier.score(images, [item.digit for item in wanted]) >= 0.95
    error = float(np.mean((images - drawn(plain, wanted)) ** 2))
    assert least < -10 * np.log10(error) < 60


@pytest.mark.more
def test_a_negative_prompt_keeps_its_digit_away(plain, classifier):
    empty = [classifier.Request("", 0, seed) for seed in range(40)]
    free = classifier.read(drawn(plain, empty))
    most = int(np.bincount(free, minlength=10).argmax())
    away = classifier.read(drawn(plain, empty, negative_prompt=f"a handwritten {classifier.WORDS[most]}"))
    assert (free == most).sum() >= 4
    assert (away == most).sum() <= 1


@pytest.mark.more
@pytest.mark.parametrize(("strength", "kept"), [(0.2, True), (0.9, False)])
def test_strength_decides_between_the_picture_and_the_prompt(strength, kept, plain, classifier, tmp_path):
    made = spec(pipeline="StableDiffusionImg2ImgPipeline", strength=strength, image={})
    built = diffkiln.compile(made, tmp_path / "bundle", base=EXAMPLE)
    wanted = classifier.requests(10)
    pictures = [(image * 255).round().astype(np.uint8) for image in drawn(plain, wanted)]
    asked = [item.digit if kept else (item.digit + 1) % 10 for item in wanted]
    from PIL import Image

    with diffkiln.load(built.path) as pipe:
        images = []
        for item, picture in zip(wanted, pictures, strict=True):
            prompt = f"a handwritten {classifier.WORDS[(item.digit + 1) % 10]}"
            call = {"image": Image.fromarray(picture), "generator": seeded(item.seed), "output_type": "np"}
            images.append(pipe(prompt, **call).images[0])
    assert classifier.score(images, asked) >= 0.8


@pytest.mark.more
def test_its_adapter_makes_digits_lean_and_leaves_no_bit_behind(plain, classifier):
    from styles import slant

    wanted = classifier.requests(10)
    before = drawn(plain, wanted)
    plain.load_lora(EXAMPLE / "lora" / "slanted.safetensors", name="slanted")
    leaning = drawn(plain, wanted)
    plain.unload_lora("slanted")
    after = drawn(plain, wanted)
    assert abs(np.mean([slant(image) for image in before])) < 0.15
    assert np.mean([slant(image) for image in leaning]) > 0.3
    np.testing.assert_array_equal(before, after)
