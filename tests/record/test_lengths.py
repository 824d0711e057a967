"""Pipelines whose shapes follow the prompt's length, recorded at a fixed one: equal to diffusers for every prompt."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import diffkiln
from diffkiln.errors import DataDependent
from diffkiln.record import lengths
from diffkiln.record.lengths import REWRITES, fingerprint, fixed_lengths
from diffkiln.record.quiet import quiet_libraries
from tests.end_to_end.test_families import spec_of
from tests.pipelines import WARNING_FILTERS
from tests.pipelines.tokenizers import WORDS

pytestmark = [pytest.mark.filterwarnings(text) for text in WARNING_FILTERS]

LENGTH = 224
#: Of 1, 20 and 200 tokens, and one that is cut.
PROMPTS = {count: " ".join((WORDS * 5)[-count:]) for count in (1, 20, 200, 400)}
#: family → the largest difference from diffusers' own call
FAMILIES = {"wan": 0.0}


@pytest.fixture(scope="module", params=FAMILIES)
def both(request, tmp_path_factory):
    """The family's name, diffusers' own pipeline, the compiled one, and the keywords of both."""
    from diffusers import DiffusionPipeline

    root = tmp_path_factory.mktemp(request.param)
    spec = spec_of(request.param, root)
    spec["inputs"]["num_inference_steps"] = 2
    spec["inputs"]["call"]["max_sequence_length"] = LENGTH
    built = diffkiln.compile(spec, root / "bundle")
    with quiet_libraries():
        reference = DiffusionPipeline.from_pretrained(spec["source"]["model"])
    reference.set_progress_bar_config(disable=True)
    given = {key: value for key, value in spec["inputs"].items() if key != "call"} | spec["inputs"]["call"]
    with diffkiln.load(built.path) as pipe:
        yield request.param, reference, pipe, given


def difference(both, **keywords):
    """The largest difference of a value, of images in [0, 1]."""
    _, reference, pipe, given = both
    with quiet_libraries():
        want, got = (
            each(generator=torch.Generator().manual_seed(5), output_type="pt", return_dict=False, **given, **keywords)
            for each in (reference, pipe)
        )
    assert want[0].shape == got[0].shape
    assert want[0].isfinite().all()
    return float((want[0] - got[0]).abs().max())


@pytest.mark.parametrize("count", PROMPTS)
def test_equals_diffusers_for_prompts_of_every_length(both, count):
    assert difference(both, prompt=PROMPTS[count]) <= FAMILIES[both[0]]


@pytest.mark.parametrize("count", PROMPTS)
def test_equals_diffusers_for_negative_prompts_of_every_length(both, count):
    assert difference(both, prompt=PROMPTS[20], negative_prompt=PROMPTS[count]) <= FAMILIES[both[0]]


@pytest.mark.parametrize("rewrite", REWRITES, ids=lambda rewrite: rewrite.method)
def test_rewrites_are_made_for_the_diffusers_that_is_installed(rewrite):
    import importlib

    for owner in rewrite.owners:
        importlib.import_module(f"diffusers.{owner.partition(':')[0]}")
    assert len(list(rewrite.classes())) == len(rewrite.owners)
    for owner in rewrite.classes():
        assert {name: fingerprint(vars(owner)[name]) for name in rewrite.prints} == dict(rewrite.prints)


def test_methods_are_replaced_only_while_it_lasts():
    from diffusers import WanPipeline

    before = WanPipeline._get_t5_prompt_embeds
    with fixed_lengths():
        assert WanPipeline._get_t5_prompt_embeds is not before
    assert WanPipeline._get_t5_prompt_embeds is before


def test_another_text_of_the_method_is_refused_and_told(tmp_path, monkeypatch):
    others = tuple(replace(rewrite, prints={rewrite.method: "another"}) for rewrite in REWRITES)
    monkeypatch.setattr(lengths, "REWRITES", others)
    with pytest.raises(DataDependent, match=r"another version of diffusers' WanPipeline\._get_t5_prompt_embeds"):
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
