"""Pipelines whose shapes follow the prompt's length, recorded at a fixed one: equal to diffusers for every prompt."""

from __future__ import annotations

import copy
import importlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import diffkiln
from diffkiln.compiler import _record, check
from diffkiln.errors import DataDependent, RecordError, VerifyError
from diffkiln.record import lengths
from diffkiln.record.lengths import REWRITES, fingerprint, fixed_lengths, lumina2, of_fixed_length, qwen_image, z_image
from diffkiln.record.quiet import quiet_libraries
from diffkiln.verification import Verification, call, close, components
from tests.end_to_end.test_families import spec_of
from tests.exporters.regions import engine_cache
from tests.pipelines import FAMILIES, WARNING_FILTERS
from tests.pipelines.tokenizers import WORDS

pytestmark = [pytest.mark.filterwarnings(text) for text in WARNING_FILTERS]

LENGTH = 224
#: Of 1, 20 and 200 tokens, and one that is cut.
PROMPTS = {count: " ".join((WORDS * 5)[-count:]) for count in (1, 20, 200, 400)}
#: family → the largest difference from diffusers' own call
ROUNDING = {"wan": 0.0, "qwen_image": 1e-5, "lumina2": 1e-5, "z_image": 1e-5}


def compiled(family, root, passes=(), **inputs):
    """diffusers' own pipeline, the compiled one, and the keywords of both."""
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    spec = spec_of(family, root)
    call = spec["inputs"]["call"] | {"max_sequence_length": LENGTH}
    spec["inputs"] |= {"num_inference_steps": 2, "call": call} | inputs
    built = diffkiln.compile(spec | {"passes": list(passes)}, root / "bundle", cache=engine_cache())
    with quiet_libraries():
        reference = DiffusionPipeline.from_pretrained(spec["source"]["model"])
    reference.set_progress_bar_config(disable=True)
    given = {key: value for key, value in spec["inputs"].items() if key not in ("call", "batch_size")} | call
    return reference, diffkiln.load(built.path), given


@pytest.fixture(scope="module", params=ROUNDING)
def both(request, tmp_path_factory):
    """The family's name, and what `compiled` gives for it."""
    made = compiled(request.param, tmp_path_factory.mktemp(request.param))
    with made[1]:
        yield request.param, *made


def difference(reference, pipe, given, **keywords):
    """The largest difference of a value, of images in [0, 1]."""
    with quiet_libraries():
        want, got = (
            each(
                generator=torch.Generator().manual_seed(5),
                output_type="pt",
                return_dict=False,
                **given,
                **copy.deepcopy(keywords),
            )[0]
            for each in (reference, pipe)
        )
    assert want.shape == got.shape
    assert want.isfinite().all()
    return float((want - got).abs().max())


@pytest.mark.parametrize("count", PROMPTS)
def test_equals_diffusers_for_prompts_of_every_length(both, count):
    family, *pair = both
    assert difference(*pair, prompt=PROMPTS[count]) <= ROUNDING[family]


@pytest.mark.parametrize("count", PROMPTS)
def test_equals_diffusers_for_negative_prompts_of_every_length(both, count):
    family, *pair = both
    assert difference(*pair, prompt=PROMPTS[20], negative_prompt=PROMPTS[count]) <= ROUNDING[family]


def test_equals_diffusers_for_another_guidance(both):
    family, reference, pipe, given = both
    if "guidance_scale" in given:
        given = given | {"guidance_scale": 1.5 * given["guidance_scale"]}
    found = difference(reference, pipe, given, prompt=PROMPTS[20], negative_prompt=PROMPTS[1])
    assert found <= ROUNDING[family]


@pytest.mark.parametrize("family", ROUNDING)
def test_equals_diffusers_for_prompts_of_several_lengths_at_once(family, tmp_path):
    repeats = {} if family == "wan" else {"num_images_per_prompt": 2}
    reference, pipe, given = compiled(family, tmp_path, batch_size=2, **repeats)
    with pipe:
        for prompts in ([PROMPTS[1], PROMPTS[200]], [PROMPTS[400], PROMPTS[20]]):
            found = difference(reference, pipe, given, prompt=prompts, negative_prompt=prompts[::-1])
            assert found <= ROUNDING[family]


@pytest.mark.parametrize("rewrite", REWRITES, ids=lambda rewrite: rewrite.owners[0].partition(":")[2])
def test_rewrites_are_made_for_the_diffusers_that_is_installed(rewrite):
    for owner in rewrite.owners:
        importlib.import_module(f"diffusers.{owner.partition(':')[0]}")
    assert len(list(rewrite.classes())) == len(rewrite.owners)
    for owner in rewrite.classes():
        prints = {name: fingerprint(rewrite.stands_for(owner, name)) for name in rewrite.prints}
        assert prints == dict(rewrite.prints)


def test_methods_are_replaced_only_while_it_lasts():
    from diffusers.pipelines.wan.pipeline_wan import WanPipeline

    before = WanPipeline._get_t5_prompt_embeds
    with fixed_lengths():
        assert WanPipeline._get_t5_prompt_embeds is not before
    assert WanPipeline._get_t5_prompt_embeds is before


def unzeroed(pipe, prompt, device=None, max_sequence_length=512, **_):
    """Wan's rewrite without its point: what the text encoder gives for the padding stays."""
    tokens = pipe.tokenizer(
        prompt, padding="max_length", max_length=max_sequence_length, truncation=True, return_tensors="pt"
    )
    return pipe.text_encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state


def test_a_rewrite_of_a_call_that_is_wrong_is_found(tmp_path, monkeypatch):
    wrong = replace(REWRITES[0], replacement=unzeroed)
    monkeypatch.setattr(lengths, "REWRITES", (wrong,))
    with pytest.raises(VerifyError, match="the recorded call of WanPipeline differs from the pipeline's own"):
        diffkiln.compile(spec_of("wan", tmp_path), tmp_path / "bundle")


def test_a_mask_that_counts_the_padding_is_found(tmp_path, monkeypatch):
    def ones(*args, **kwargs):
        embeds, mask = right(*args, **kwargs)
        return embeds, torch.ones_like(mask)

    (rewrite,) = qwen_image.REWRITES
    right = rewrite.replacement
    monkeypatch.setattr(lengths, "REWRITES", (replace(rewrite, replacement=ones),))
    with pytest.raises(VerifyError, match="the recorded call of QwenImagePipeline differs"):
        diffkiln.compile(spec_of("qwen_image", tmp_path), tmp_path / "bundle")


def test_a_component_that_sees_the_padding_is_found(tmp_path, monkeypatch):
    """What diffusers' own code does with a mask is believed no more than our own."""
    from diffusers.models.transformers import transformer_qwenimage

    unmasked = lambda embeds, _mask: (embeds.shape[1], None, None)  # noqa: E731
    monkeypatch.setattr(transformer_qwenimage, "compute_text_seq_len_from_mask", unmasked)
    with pytest.raises(VerifyError, match="component 'transformer' at a fixed length: output 0 differs"):
        diffkiln.compile(spec_of("qwen_image", tmp_path), tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_a_position_that_is_off_by_one_is_found(tmp_path, monkeypatch):
    right = lumina2._image_ids
    monkeypatch.setattr(lumina2, "_image_ids", lambda lengths, *size: right(lengths + 1, *size))
    with pytest.raises(VerifyError, match="component 'transformer' at a fixed length: output 0 differs"):
        diffkiln.compile(spec_of("lumina2", tmp_path), tmp_path / "bundle")


def test_another_multiple_of_the_length_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(z_image, "_MULTIPLE", 16)
    with pytest.raises(VerifyError, match="component 'transformer' at a fixed length: output 0 differs"):
        diffkiln.compile(spec_of("z_image", tmp_path), tmp_path / "bundle")


@pytest.mark.parametrize("family", ["qwen_image", "lumina2", "z_image"])
def test_large_components_in_other_types_are_verified_too(family, tmp_path, monkeypatch):
    """As twins; lengths are compared in float32, so that what bfloat16 and int8 activations round does not count."""
    check = Verification.check_component
    monkeypatch.setattr(call, "WHOLE_UP_TO", 0)
    monkeypatch.setattr(Verification, "check_component", lambda *args: args[1] == "vae" or check(*args))
    compared = []
    monkeypatch.setattr(components, "close", lambda want, got: compared.append(want.dtype) or close(want, got))
    spec = spec_of(family, tmp_path)
    spec["source"]["dtype"] = "bfloat16"
    spec["passes"] = [{"name": "quantize", "mapping": {"transformer": {"type": "int8_dynamic"}}}]
    diffkiln.compile(spec, tmp_path / "bundle")
    assert set(compared) == {torch.float32}


@pytest.mark.parametrize("family", ["qwen_image", "z_image"])
def test_a_tokenizer_that_pads_on_the_left_is_refused(family, tmp_path):
    spec = spec_of(family, tmp_path)
    file = Path(spec["source"]["model"]) / "tokenizer" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"padding_side": "left"}))
    with pytest.raises(RecordError, match="pads on the left"):
        diffkiln.compile(spec, tmp_path / "bundle")


def test_components_of_fixed_length_are_named():
    expected = {"wan": set(), "qwen_image": {"text_encoder", "transformer"}, "lumina2": {"transformer"}}
    for family, names in expected.items():
        assert of_fixed_length(FAMILIES[family].build(), {"max_sequence_length": LENGTH}) == names


def test_engines_that_do_not_fit_diffusers_own_call_are_told(tmp_path):
    notices = []
    with quiet_libraries():
        for family in ("wan", "z_image"):
            spec = spec_of(family, tmp_path) | {"passes": [{"name": "compile", "component": "transformer"}]}
            _record(check(spec), notices)
    assert len(notices) == 1
    assert "the engines of transformer are for prompts padded to a fixed length" in notices[0]


def test_another_text_of_the_method_is_refused_and_told(tmp_path, monkeypatch):
    others = tuple(replace(rewrite, prints={rewrite.method: "another"}) for rewrite in REWRITES)
    monkeypatch.setattr(lengths, "REWRITES", others)
    told = r"another version of diffusers' WanPipeline\._get_t5_prompt_embeds.*on_unrecordable"
    with pytest.raises(DataDependent, match=told):
        diffkiln.compile(spec_of("wan", tmp_path), tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_fingerprints_tell_code_and_not_words():
    class First:
        def method(self, a: int) -> int:
            """Words."""
            return a + 1  # more words

    class Second:
        def method(self, a):
            return a + 1

    class Third:
        def method(self, a):
            return a + 2

    prints = [fingerprint(kind.method) for kind in (First, Second, Third)]
    assert prints[0] == prints[1] != prints[2]


def test_close_means_type_shape_and_rounding_of_the_largest():
    a = torch.tensor([100.0, 1.0])
    assert close(a, a + torch.tensor([0.0, 5e-4]))
    assert not close(a, a + torch.tensor([0.0, 5e-3]))
    assert not close(a, a.double())
    assert not close(a, a[:1])
    for broken in (float("nan"), float("inf")):
        assert not close(a, torch.tensor([100.0, broken]))
        assert not close(torch.tensor([100.0, broken]), a)
