"""Qwen-Image-Edit: the text encoder sees the image, no prompt is cut, and those that fit give what diffusers gives."""

from __future__ import annotations

import json
from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

import diffkiln
from diffkiln.compiler.compile import _recorded, check
from diffkiln.errors import CallError, DataDependent, RecordError, VerifyError
from diffkiln.families.qwen_image import edit, vision
from diffkiln.interpreter.quiet import quiet_libraries
from diffkiln.record import patches
from diffkiln.record.patches import known_patches, of_fixed_length
from tests.coverage.calls import CALLS
from tests.coverage.calls.measure import spec_of
from tests.pipelines import WARNING_FILTERS
from tests.pipelines.tokenizers import WORDS

pytestmark = [pytest.mark.long, *(pytest.mark.filterwarnings(text) for text in WARNING_FILTERS)]

#: Of 1, 20 and 90 tokens and the template's end.
PROMPTS = {count: " ".join((WORDS * 5)[-count:]) for count in (1, 20, 90)}
LENGTH = 128
ONE = {"image": {"height": 40, "width": 80}}


@pytest.fixture(scope="module", autouse=True)
def small():
    """Images of 128 x 128 pixels' area where diffusers makes 1024 x 1024 of every image, and 64 x 64 of 384 x 384."""
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus

    with pytest.MonkeyPatch.context() as patch:
        for module in (pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus):
            right = module.calculate_dimensions
            patch.setattr(module, "calculate_dimensions", lambda area, ratio, right=right: right(area // 64, ratio))
        yield


def spec_for(family, root):
    with quiet_libraries():
        CALLS[family].build().save_pretrained(root / family, safe_serialization=True)
    spec = spec_of(CALLS[family], root / family)
    spec["inputs"] |= {"num_inference_steps": 2, "call": {"true_cfg_scale": 4.0, "max_sequence_length": LENGTH} | ONE}
    return spec


def compiled(spec, family, root):
    """diffusers' own pipeline and the compiled one."""
    built = diffkiln.compile(spec, root / "bundle")
    with quiet_libraries():
        reference = getattr(diffusers, type(CALLS[family].build()).__name__).from_pretrained(spec["source"]["model"])
    reference.set_progress_bar_config(disable=True)
    return reference, diffkiln.load(built.path)


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """For one prompt, and for two with an image each."""
    root = tmp_path_factory.mktemp("edit")
    spec = spec_for("qwen_image_edit", root)
    one = spec["inputs"]
    call = one["call"] | {"image": [ONE["image"]] * 2}
    spec["inputs"] = [one, one | {"batch_size": 2, "num_images_per_prompt": 2, "call": call}]
    reference, pipe = compiled(spec, "qwen_image_edit", root)
    with pipe:
        yield reference, pipe


def picture(seed, width=80, height=40):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def drawn(pipe, **given):
    sizes = {"height": 64, "width": 64, "num_inference_steps": 2, "max_sequence_length": LENGTH}
    with quiet_libraries():
        return pipe(**sizes | given, generator=torch.Generator().manual_seed(5), output_type="pt").images


def difference(both, **given):
    want, got = (drawn(pipe, **given) for pipe in both)
    assert want.shape == got.shape
    assert want.isfinite().all()
    return float((want - got).abs().max())


@pytest.mark.parametrize("count", PROMPTS)
def test_equals_diffusers_for_prompts_of_every_length_and_other_images(both, count):
    assert difference(both, prompt=PROMPTS[count], image=picture(count)) <= 1e-5


@pytest.mark.parametrize("count", PROMPTS)
def test_equals_diffusers_for_negative_prompts_of_every_length(both, count):
    given = {"prompt": PROMPTS[20], "negative_prompt": PROMPTS[count]}
    assert difference(both, **given, image=picture(1)) <= 1e-5


def test_equals_diffusers_for_prompts_of_several_lengths_with_an_image_each(both):
    given = {"prompt": [PROMPTS[1], PROMPTS[90]], "negative_prompt": [PROMPTS[20], " "], "num_images_per_prompt": 2}
    assert difference(both, **given, image=[picture(1), picture(2)]) <= 1e-5


def test_the_image_changes_what_is_drawn(both):
    """Through the text encoder too, not through the autoencoder alone."""
    found = [drawn(both[1], prompt="a fox", image=picture(seed)) for seed in (1, 2)]
    assert float((found[0] - found[1]).abs().max()) > 1e-3


def test_a_prompt_that_is_too_long_is_refused(both):
    with pytest.raises(CallError, match=r"prompt: \d+ tokens with the pipeline's own text"):
        drawn(both[1], prompt=" ".join(WORDS * 5), image=picture(1))


def test_a_prompt_with_the_mark_of_an_image_is_refused_as_by_diffusers(both):
    given = {"prompt": "a <|image_pad|> fox", "image": picture(1)}
    with pytest.raises(ValueError, match="Found total 2"):
        drawn(both[0], **given)
    with pytest.raises(CallError, match=r"prompt: <\|image_pad\|> stands for an image"):
        drawn(both[1], **given)


def test_an_image_of_another_size_is_refused(both):
    with pytest.raises(CallError, match=r"image: 64 x 64 pixels \(width x height\), this variant takes 80 x 40"):
        drawn(both[1], prompt="a fox", image=picture(1, 64, 64))


def test_several_images_of_several_sizes_come_before_one_prompt(tmp_path):
    spec = spec_for("qwen_image_edit_plus", tmp_path)
    spec["inputs"]["call"]["image"] = [{}, {"height": 40, "width": 80}]
    reference, pipe = compiled(spec, "qwen_image_edit_plus", tmp_path)
    with pipe:
        images = [picture(1, 64, 64), picture(2)]
        assert difference((reference, pipe), prompt=PROMPTS[20], negative_prompt=" ", image=images) <= 1e-5


def recorded(root, edit=None, **inputs):
    """The recording of Qwen-Image-Edit with other inputs, or after a change of its folder."""
    spec = spec_for("qwen_image_edit", root)
    call = spec["inputs"]["call"] | inputs.pop("call", {})
    if edit:
        edit(root / "qwen_image_edit")
    with quiet_libraries():
        return _recorded(check(spec | {"inputs": spec["inputs"] | inputs | {"call": call}})).recording


@pytest.mark.parametrize(
    ("inputs", "told"),
    [
        ({"batch_size": 2}, "takes one image for each prompt, and is given 1 for 2"),
        ({"call": {"image": [{}, {}]}}, "takes one image for each prompt, and is given 2 for 1"),
        ({"batch_size": 2, "call": {"image": [{}, {"width": 128}]}}, "images of several sizes in a batch"),
    ],
    ids=["too-few", "too-many", "sizes"],
)
def test_images_that_do_not_fit_the_prompts_are_refused(tmp_path, inputs, told):
    with pytest.raises(RecordError, match=told):
        recorded(tmp_path, **inputs)


def test_a_tokenizer_that_pads_on_the_left_is_refused(tmp_path):
    def edit(folder):
        file = folder / "processor" / "tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"padding_side": "left"}))

    with pytest.raises(RecordError, match="pads on the left"):
        recorded(tmp_path, edit)


def test_another_text_encoder_of_transformers_is_refused_and_told(tmp_path, monkeypatch):
    others = [patch for patch in known_patches() if patch not in vision.PATCHES]
    others += [replace(patch, prints={"forward": "another"}) for patch in vision.PATCHES]
    monkeypatch.setattr(patches, "known_patches", lambda: others)
    with pytest.raises(DataDependent, match=r"another version of transformers' Qwen2_5_VLModel\.forward"):
        recorded(tmp_path)


def test_images_in_another_place_are_found(tmp_path, monkeypatch):
    right = vision._seen
    monkeypatch.setattr(vision, "_seen", lambda *given: right(*given).roll(1, 0))
    with pytest.raises(VerifyError, match="component 'text_encoder' at a fixed length"):
        diffkiln.compile(spec_for("qwen_image_edit", tmp_path), tmp_path / "bundle")


def test_a_template_without_its_images_is_found(tmp_path, monkeypatch):
    right = edit._before
    monkeypatch.setattr(edit, "_before", lambda *given: right(*given).replace("image_pad", "video_pad"))
    with pytest.raises(VerifyError, match="the recorded call of QwenImageEditPipeline differs from"):
        diffkiln.compile(spec_for("qwen_image_edit", tmp_path), tmp_path / "bundle")


def test_both_components_are_of_fixed_length():
    assert of_fixed_length(CALLS["qwen_image_edit"].build(), {"max_sequence_length": LENGTH}) == {
        "text_encoder",
        "transformer",
    }
