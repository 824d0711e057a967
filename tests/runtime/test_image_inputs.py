"""Bundles whose calls take images: in the original pipeline's way, with what it gives."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

import diffkiln
from diffkiln.cli import main
from diffkiln.errors import CallError, IllegalPlan, RecordError, SourceError, SpecError
from diffkiln.interpreter.portable import portable
from diffkiln.interpreter.quiet import quiet_libraries
from tests.coverage.calls import CALLS
from tests.coverage.calls.measure import spec_of
from tests.pipelines import WARNING_FILTERS, build_folder
from tests.portably import Portably, as_recorded

pytestmark = [pytest.mark.filterwarnings(text) for text in WARNING_FILTERS]


def noise(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def saved(name, root):
    with quiet_libraries():
        CALLS[name].build().save_pretrained(root, safe_serialization=True)
    return spec_of(CALLS[name], root)


@pytest.fixture(scope="module")
def inpaint(tmp_path_factory):
    """Filling a part of an image: for one prompt, and for two with an image each."""
    spec = saved("sd_inpaint", tmp_path_factory.mktemp("sd-inpaint") / "model")
    one = spec["inputs"]
    two = one | {"batch_size": 2, "call": one["call"] | {"image": [{}, {}], "mask_image": [{}, {}]}}
    spec["inputs"] = [one, two]
    return spec, diffkiln.compile(spec, tmp_path_factory.mktemp("bundle") / "inpaint").path


@pytest.fixture(scope="module")
def pipe(inpaint):
    with diffkiln.load(inpaint[1]) as loaded:
        yield Portably(loaded)


@pytest.fixture(scope="module")
def eager(inpaint):
    from diffusers import StableDiffusionInpaintPipeline

    with quiet_libraries(), portable():
        loaded = StableDiffusionInpaintPipeline.from_pretrained(inpaint[0]["source"]["model"])
    loaded.set_progress_bar_config(disable=True)
    one = inpaint[0]["inputs"][0]
    keywords = {key: value for key, value in (one | one["call"]).items() if key not in ("call", "image", "mask_image")}

    def call(*args, **given):
        with quiet_libraries(), as_recorded():
            return loaded(*args, **keywords | given)

    return call


def seeded(*seeds):
    made = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    return made[0] if len(made) == 1 else made


@pytest.mark.parametrize("size", [(64, 64), (100, 40)])
def test_images_of_any_size_are_resized_as_diffusers_resizes_them(pipe, eager, size):
    given = {"image": noise(*size), "mask_image": noise(*size, seed=1), "output_type": "pt"}
    want = eager("A red Fox", generator=seeded(3), **given).images
    assert torch.equal(want, pipe("A red Fox", generator=seeded(3), **given).images)


@pytest.mark.parametrize("size", [(64, 64), (100, 40)])
@pytest.mark.parametrize("kind", ["array", "tensor"])
def test_numbers_are_what_they_are_in_diffusers(pipe, eager, kind, size):
    image, mask = (np.asarray(noise(*size, seed), np.float32)[::-1] / 255 for seed in (0, 1))
    given = {"image": image, "mask_image": mask[..., 0]}
    if kind == "tensor":
        image = torch.from_numpy(image.copy()).permute(2, 0, 1)
        given = {"image": image[None], "mask_image": torch.from_numpy(mask[..., 0].copy())[None, None]}
    want = eager("A red Fox", generator=seeded(3), output_type="pt", **given).images
    assert torch.equal(want, pipe("A red Fox", generator=seeded(3), output_type="pt", **given).images)


def test_a_batch_has_an_image_and_a_generator_each(pipe, eager):
    given = {"image": [noise(64, 64), noise(80, 64, 1)], "mask_image": [noise(64, 64, 2), noise(64, 64, 3)]}
    prompts = ["A red Fox", "a blue cat"]
    want = eager(prompts, generator=seeded(1, 2), output_type="pt", **given).images
    got = pipe(prompts, generator=seeded(1, 2), output_type="pt", **given).images
    assert (want - got).abs().max() < 1e-5  # diffusers encodes them one by one


def test_missing_and_superfluous_images_are_told(pipe):
    image = noise(64, 64)
    with pytest.raises(CallError, match="mask_image: this variant takes 1 image, and none is given"):
        pipe("a fox", image=image)
    with pytest.raises(CallError, match="image: this variant takes 2 images, and 1 is given"):
        pipe(["a fox", "a cat"], image=image, mask_image=[image, image])
    with pytest.raises(CallError, match="control_image: StableDiffusionInpaintPipeline was not compiled with"):
        pipe("a fox", image=image, mask_image=image, control_image=image)


def test_the_manifest_says_what_is_taken(inpaint):
    manifest = json.loads((inpaint[1] / "manifest.json").read_text())
    assert "image_inputs" in manifest["features_required"]
    assert manifest["pipeline"]["variants"][0]["fixed"]["mask_image"] == {"height": 64, "width": 64}


def test_the_command_line_takes_image_files(inpaint, tmp_path, capsys):
    for name in ("image", "mask"):
        noise(64, 64).save(tmp_path / f"{name}.png")
    given = ["--image", f"{tmp_path}/image.png", "--image", f"mask_image={tmp_path}/mask.png", "--seed", "1"]
    for way in ([], ["--as-diffusers"]):
        out = tmp_path / f"out{len(way)}.png"
        assert main(["run", str(inpaint[1]), "--prompt", "a fox", *given, "-o", str(out), *way]) == 0
        with Image.open(out) as image:
            assert image.size == (64, 64)
    assert main(["run", str(inpaint[1]), "--prompt", "a fox", "-o", str(tmp_path / "no.png")]) != 0
    assert "image: this variant takes 1 image" in capsys.readouterr().err
    given += ["--image", f"control_image={tmp_path}/mask.png", "-o", str(tmp_path / "no.png")]
    assert main(["run", str(inpaint[1]), "--prompt", "a fox", *given]) == 2
    assert "control_image: StableDiffusionInpaintPipeline was not compiled with this" in capsys.readouterr().err
    assert main(["run", str(inpaint[1]), "--prompt", "a fox", *given, "--as-diffusers"]) == 2
    assert "StableDiffusionInpaintPipeline has no keyword control_image" in capsys.readouterr().err


def test_another_class_of_the_same_components(tmp_path):
    from diffusers import StableDiffusionImg2ImgPipeline

    model = build_folder("sd", tmp_path)
    spec = {
        "spec_version": 1,
        "source": {"model": str(model), "pipeline": "StableDiffusionImg2ImgPipeline"},
        "target": {"device": "cpu"},
        "inputs": {"height": 48, "width": 64, "num_inference_steps": 4, "call": {"strength": 0.5, "image": {}}},
    }
    built = diffkiln.compile(spec, tmp_path / "bundle")
    given = {"image": noise(64, 48), "strength": 0.5, "num_inference_steps": 4, "output_type": "pt"}
    with quiet_libraries(), portable():
        eager = StableDiffusionImg2ImgPipeline.from_pretrained(model)
        eager.set_progress_bar_config(disable=True)
        with torch.inference_mode():
            want = eager("a fox", generator=seeded(1), **given).images
    with diffkiln.load(built.path) as pipe, as_recorded():
        assert torch.equal(want, pipe("a fox", generator=seeded(1), **given).images)
        with pytest.raises(CallError, match=r"32 x 32 pixels \(width x height\), this variant takes 64 x 48"):
            pipe("a fox", **given | {"image": noise(32, 32)})
    original = diffkiln.load(built.path, as_diffusers=True)
    assert type(original).__name__ == "StableDiffusionImg2ImgPipeline"
    assert json.loads((built.path / "spec.json").read_text())["source"]["pipeline"] == "StableDiffusionImg2ImgPipeline"


@pytest.mark.parametrize(
    ("pipeline", "reason"),
    [
        ("StableDiffusionControlNetPipeline", "needs controlnet, which this StableDiffusionPipeline does not have"),
        ("StableDifusionPipeline", "has no class 'StableDifusionPipeline'"),
        ("UNet2DConditionModel", "is a class of diffusers, but not a pipeline"),
    ],
)
def test_a_class_that_does_not_fit_the_model_is_refused(tmp_path, pipeline, reason):
    spec = spec_of(CALLS["sd"], build_folder("sd", tmp_path))
    spec["source"]["pipeline"] = pipeline
    with pytest.raises(SourceError, match=rf"\$\.source\.pipeline: .*{reason}"):
        diffkiln.check(spec)


@pytest.mark.parametrize("size", ["fox.png", {"hight": 3}, {"height": 0}, [], True])
def test_images_stand_in_a_spec_by_their_size(inpaint, size):
    spec = inpaint[0]
    one = spec["inputs"][0]
    with pytest.raises(SpecError, match=r'\$\.inputs\.call\.image: .* Write "image": \{\}'):
        diffkiln.check(spec | {"inputs": one | {"call": one["call"] | {"image": size}}})


def test_an_image_that_the_call_does_not_take(tmp_path):
    spec = spec_of(CALLS["sd"], build_folder("sd", tmp_path))
    spec["inputs"]["call"]["mask_image"] = {}
    with pytest.raises(SpecError, match="the call of StableDiffusionPipeline has no keyword 'mask_image'"):
        diffkiln.check(spec)


def test_a_pipeline_that_lacks_its_image_is_told_how_to_say_it(inpaint, tmp_path):
    spec = inpaint[0]
    one = spec["inputs"][0]
    call = {key: value for key, value in one["call"].items() if "image" not in key}
    with pytest.raises(RecordError, match=r'If it needs images, name them in inputs\.call: \{"image": \{\}\}'):
        diffkiln.compile(spec | {"inputs": one | {"call": call}}, tmp_path / "bundle")


def test_steps_that_the_strength_leaves_out_are_not_counted(inpaint):
    spec = inpaint[0]
    one = spec["inputs"][0]
    assert diffkiln.check(spec | {"inputs": one}).state.steps == ()
    assert diffkiln.check(spec | {"inputs": one | {"call": one["call"] | {"strength": 1.0}}}).state.steps
    source = spec["source"] | {"pipeline": "StableDiffusionImg2ImgPipeline"}  # which leaves steps out unless it is told
    assert diffkiln.check(spec | {"source": source, "inputs": one | {"call": {"image": {}}}}).state.steps == ()


def test_calibrate_has_no_images(inpaint, tmp_path):
    (tmp_path / "prompts.txt").write_text("a fox\n")
    passes = [
        {"name": "calibrate", "component": "unet", "prompts": str(tmp_path / "prompts.txt"), "computed": 2},
        {"name": "cache_schedule", "component": "unet", "method": "deepcache", "steps": "calibrated"},
    ]
    with pytest.raises(IllegalPlan, match="calibrate draws from prompts alone"):
        diffkiln.check(inpaint[0] | {"passes": passes})


def test_a_call_that_casts_its_autoencoder_while_it_runs(tmp_path):
    """SDXL encodes in float32 and decodes in the pipeline's type; the bundle holds each weight once, in that type."""
    from diffusers import StableDiffusionXLImg2ImgPipeline

    spec = saved("sdxl_img2img", tmp_path / "model")
    spec["source"]["dtype"] = "bfloat16"
    built = diffkiln.compile(spec, tmp_path / "bundle")
    given = {"image": noise(64, 64), "strength": 0.6, "num_inference_steps": 3, "output_type": "pt"}
    with quiet_libraries(), portable():
        eager = StableDiffusionXLImg2ImgPipeline.from_pretrained(tmp_path / "model", torch_dtype=torch.bfloat16)
        eager.set_progress_bar_config(disable=True)
        with torch.inference_mode():
            want = eager("a fox", generator=seeded(1), **given).images
    with diffkiln.load(built.path) as pipe, as_recorded():
        assert torch.equal(want, pipe("a fox", generator=seeded(1), **given).images)
    assert types_in(built.path / "weights" / "vae") == {"BF16"}


def types_in(folder):
    from safetensors import safe_open

    found = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            found |= {opened.get_slice(name).get_dtype() for name in opened.keys()}  # noqa: SIM118
    return found
