"""What calls take and give: bundles of pipelines that differ in that, compared with diffusers."""

from __future__ import annotations

import wave

import numpy as np
import pytest
import torch
from PIL import Image

import diffkiln
from diffkiln.cli import main
from diffkiln.errors import BuildError, CallError, RecordError, SpecError
from diffkiln.interpreter.quiet import quiet_libraries
from diffkiln.record.keywords import parameters_of
from tests.coverage.calls import CALLS
from tests.pipelines import FAMILIES, WARNING_FILTERS
from tests.pipelines.inputs import INPUTS
from tests.portably import as_recorded

COPIES = "ignore:To copy construct from a tensor:UserWarning"  # which DiT does with labels that are one
OLD_NORM = "ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning"
pytestmark = [pytest.mark.filterwarnings(text) for text in (*WARNING_FILTERS, COPIES, OLD_NORM)]

STEPS = {"num_inference_steps": 2}
#: Kernels for two prompts add up in another order.
ROUNDING = 2e-5


def picture(size=64, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8))


def seeded(seed=5):
    return torch.Generator().manual_seed(seed)


def spec_of(family, folder, call=None, **inputs):
    """A family's spec, with more keywords of its call, in a folder that has its pipeline."""
    if not folder.joinpath("model").exists():
        with quiet_libraries():
            family.build().save_pretrained(folder / "model", safe_serialization=True)
    own = family.call | STEPS
    fields = ("height", "width", "num_frames", "num_inference_steps", "guidance_scale")
    given = {name: own[name] for name in fields if name in own}
    rest = {name: value for name, value in own.items() if name not in fields} | dict(family.images)
    return {
        "spec_version": 1,
        "source": {"model": str(folder / "model")},
        "target": {"device": "cpu"},
        "inputs": given | {"call": rest | (call or {})} | inputs,
    }


class Pair:
    """A pipeline and its bundle."""

    def __init__(self, family, folder, call=None, **inputs):
        self.family, self.spec = family, spec_of(family, folder, call, **inputs)
        self.bundle = diffkiln.compile(self.spec, folder / "bundle").path
        self.pipe, self.eager = diffkiln.load(self.bundle), family.build()

    def difference(self, fixed=None, **given):
        """The largest difference of any result, relative to the largest value where that is above one."""
        fixed = self.family.call | STEPS | (fixed or {})
        form = {"output_type": "pt"} if "output_type" in parameters_of(self.eager) else {}
        with quiet_libraries(), as_recorded(), torch.inference_mode():
            want = self.eager(**fixed | given, **form, generator=seeded())
            got = self.pipe(**given, **form, generator=seeded())
        assert set(got) == {name for name, value in want.items() if isinstance(value, torch.Tensor)}
        for name, value in got.items():
            assert value.shape == want[name].shape
        gaps = [(value - want[name]).abs().max() / want[name].abs().max().clamp(min=1) for name, value in got.items()]
        return float(max(gaps))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Makes the pair of a family, once."""
    pairs = {}

    def make(name, table=INPUTS, call=None, key="", **inputs):
        place = f"{name}{key}"
        if place not in pairs:
            pairs[place] = Pair(table[name], tmp_path_factory.mktemp(place), call, **inputs)
        return pairs[place]

    return make


# -- prompts --


def test_a_keyword_is_a_prompt_if_it_reaches_a_tokenizer_and_not_by_its_name(made):
    template = {"template": "{}", "crop_start": 0}
    pair = made("hunyuan_video", CALLS, {"prompt_template": template})
    assert pair.difference({"prompt_template": template}, prompt="a fox") <= ROUNDING
    assert pair.pipe.variants[0].fixed["prompt_template"] == template


def test_a_pipeline_that_needs_a_negative_prompt(made):
    pair = made("easy_animate")
    for negative in ("ugly", ""):
        assert pair.difference(prompt="a fox", negative_prompt=negative) <= ROUNDING
    with pytest.raises(CallError, match=r'negative_prompt: this pipeline needs one\. Give ""'):
        pair.pipe("a fox")


def test_a_processor_of_texts_and_images_as_tokenizer(made):
    pair = made("flux2_processor")
    assert pair.difference(prompt="a fox in the snow") <= ROUNDING
    with pytest.raises(CallError, match="stands for an image"):
        pair.pipe("a <|image_pad|> fox")


# -- what else comes in --


def test_without_conditions(made):
    pair = made("ddim", batch_size=2)
    assert pair.difference({"batch_size": 2}) <= ROUNDING
    with pytest.raises(CallError, match="prompt: this variant takes none"):
        pair.pipe("a fox")


def test_class_labels_are_fixed_in_a_variant(made):
    pair = made("dit", call={"class_labels": [3, 7]}, key="_fixed")
    assert pair.difference({"class_labels": [3, 7]}) <= ROUNDING


@pytest.mark.parametrize("labels", [[3, 7], torch.tensor([0, 999])])
def test_class_labels_that_a_caller_gives(made, labels):
    pair = made("dit", call={"class_labels": {"shape": [2], "dtype": "int64"}})
    assert pair.difference(class_labels=labels) <= ROUNDING


def test_an_image_that_is_encoded_in_the_place_of_a_prompt(made):
    pair = made("image_variation")
    assert pair.difference(image=picture()) <= ROUNDING
    assert pair.difference(image=picture(seed=1)) <= ROUNDING


def test_an_image_that_becomes_a_video(made):
    assert made("svd").difference(image=picture()) <= ROUNDING


EMBEDS = {"prompt_embeds": {"shape": [1, 77, 32], "dtype": "float32"}}


def test_embeddings_in_the_place_of_prompts(made):
    pair = made("sd", FAMILIES, EMBEDS)
    embeds = torch.randn(1, 77, 32, generator=seeded(1))
    assert pair.difference(prompt_embeds=embeds) <= ROUNDING
    assert pair.difference(prompt_embeds=embeds, negative_prompt="ugly") <= ROUNDING
    assert pair.difference(prompt_embeds=embeds, guidance_scale=3.0) <= ROUNDING


def test_pooled_and_negative_embeddings(made):
    shapes = {"prompt_embeds": [1, 77, 64], "pooled_prompt_embeds": [1, 32]}
    shapes |= {f"negative_{name}": shape for name, shape in shapes.items()}
    pair = made("sdxl", FAMILIES, {name: {"shape": shape} for name, shape in shapes.items()})
    given = {name: torch.randn(shape, generator=seeded(len(name))) for name, shape in shapes.items()}
    assert pair.difference(**given) <= ROUNDING


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, r"prompt_embeds: this variant takes float32\[1,77,32\], and none is given"),
        ({"prompt": "a fox"}, "prompt: this variant takes prompt_embeds in its place"),
        ({"prompt_embeds": torch.zeros(1, 5, 32)}, r"shape \(1, 5, 32\), this variant takes \(1, 77, 32\)"),
        ({"prompt_embeds": "a fox"}, "prompt_embeds: str is neither a tensor nor an array"),
        ({"prompt_embeds": torch.zeros(1, 77, 32, dtype=torch.complex64)}, "complex64, this variant takes float32"),
    ],
)
def test_embeddings_that_do_not_fit_are_refused(made, given, message):
    with pytest.raises(CallError, match=message):
        made("sd", FAMILIES, EMBEDS).pipe(**given)


def test_an_undeclared_tensor_is_refused_with_what_to_declare_and_never_its_numbers(made):
    pair = made("sd", FAMILIES, EMBEDS)
    with pytest.raises(CallError) as refused:
        pair.pipe(prompt_embeds=torch.zeros(1, 77, 32), negative_prompt_embeds=torch.full((1, 77, 32), 0.125))
    assert '"call": {"negative_prompt_embeds": {"shape": [1, 77, 32], "dtype": "float32"}}' in str(refused.value)
    assert "0.125" not in str(refused.value)


# -- what comes out --


def test_several_tensors_are_all_given(made):
    pair = made("kandinsky_prior")
    assert pair.difference(prompt="a fox") <= ROUNDING
    made_so = pair.pipe("a fox", generator=seeded())
    assert isinstance(made_so.image_embeds, torch.Tensor)
    assert made_so.negative_image_embeds.shape == made_so.image_embeds.shape
    with pytest.raises(CallError, match="'pil' is of pictures, and this call gives image_embeds"):
        pair.pipe("a fox", output_type="pil")


def test_sound_is_given_with_its_rate_and_written_as_wav(made, tmp_path):
    pair = made("stable_audio")
    assert pair.difference(prompt="rain") <= ROUNDING
    assert isinstance(pair.pipe("rain", generator=seeded()).audios, torch.Tensor)  # as diffusers gives it
    sound = pair.pipe("rain", generator=seeded(), output_type="np")
    assert sound.rate == 64
    output = tmp_path / "rain.wav"
    assert main(["run", str(pair.bundle), "--prompt", "rain", "--seed", "5", "-o", str(output)]) == 0
    with wave.open(str(output)) as file:
        assert (file.getframerate(), file.getnchannels(), file.getsampwidth()) == (64, 2, 2)
        read = np.frombuffer(file.readframes(file.getnframes()), "<i2").reshape(-1, 2).T
    assert np.abs(read / 32767 - np.clip(sound.audios[0], -1, 1)).max() < 1e-4


# -- what is refused, and when --


def test_check_passes_on_what_the_pipeline_itself_refuses(tmp_path):
    spec = spec_of(FAMILIES["sd3"], tmp_path, height=66)
    spec["runtime"] = {"on_unrecordable": "diffusers"}
    with pytest.raises(SpecError, match="says: `height` and `width` have to be divisible by 16") as refused:
        diffkiln.check(spec)
    assert "on_unrecordable" not in str(refused.value)
    assert "Kiln" not in str(refused.value)


def test_what_the_call_needs_and_does_not_have_is_told_before(tmp_path):
    spec = spec_of(INPUTS["dit"], tmp_path, height=64)
    with pytest.raises(SpecError) as refused:
        diffkiln.check(spec)
    assert [problem.where for problem in refused.value.problems] == ["$.inputs.height", "$.inputs.call.class_labels"]


def test_a_bundle_that_runs_as_diffusers_is_called_before_it_is_published(tmp_path, monkeypatch):
    def unrecordable(*_args, **_keywords):
        raise RecordError("made so")

    spec = spec_of(INPUTS["easy_animate"], tmp_path) | {"runtime": {"on_unrecordable": "diffusers"}}
    monkeypatch.setattr("diffkiln.compiler.compile.record", unrecordable)
    monkeypatch.setattr(
        "diffusers.EasyAnimatePipeline.encode_prompt", lambda *_args, **_keywords: [][0] if _args else None
    )
    with pytest.raises(BuildError, match="EasyAnimatePipeline fails as diffusers, so the bundle is not published"):
        diffkiln.compile(spec, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize("name", ["image_variation", "svd"])
def test_a_feature_extractor_that_the_call_reads_is_in_a_bundle_that_loads(name, tmp_path, monkeypatch):
    def unrecordable(*_args, **_keywords):
        raise RecordError("made so")

    monkeypatch.setattr("diffkiln.compiler.compile.record", unrecordable)
    spec = spec_of(INPUTS[name], tmp_path) | {"runtime": {"on_unrecordable": "diffusers"}}
    built = diffkiln.compile(spec, tmp_path / "bundle")
    pipe = diffkiln.load(built.path, as_diffusers=True)
    assert pipe.feature_extractor is not None


def test_a_feature_extractor_that_the_call_does_not_read_is_left_out(tmp_path):
    family = FAMILIES["sd"]
    spec = spec_of(family, tmp_path)
    with quiet_libraries():
        pipe = family.build()
        pipe.register_modules(feature_extractor=INPUTS["image_variation"].build().feature_extractor)
        pipe.save_pretrained(tmp_path / "model", safe_serialization=True)
    built = diffkiln.compile(spec, tmp_path / "bundle")
    assert "feature_extractor is left out: the call does not read it" in built.notices
    assert not (built.path / "pipeline" / "feature_extractor").exists()
    assert diffkiln.load(built.path, as_diffusers=True).feature_extractor is None
