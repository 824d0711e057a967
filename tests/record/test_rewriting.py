"""Methods of the libraries that are replaced while a call is recorded: made for one text of them, only for so long."""

from __future__ import annotations

import importlib

import pytest
import torch

from diffkiln.record.lengths import REWRITES, fingerprint, fixed_lengths
from diffkiln.record.lengths.rewriting import Rewrite, replaced, resized


@pytest.mark.parametrize("rewrite", REWRITES, ids=lambda rewrite: rewrite.owners[0].partition(":")[2])
def test_rewrites_are_made_for_the_libraries_that_are_installed(rewrite):
    for owner in rewrite.owners:
        importlib.import_module(f"{rewrite.library}.{owner.partition(':')[0]}")
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


def test_a_replacement_may_call_the_method_whose_place_it_takes():
    from diffusers.pipelines.wan.pipeline_wan import WanPipeline

    def around(original):
        return lambda self, *args: (original, args)

    owner = "pipelines.wan.pipeline_wan:WanPipeline"
    before = WanPipeline.encode_prompt
    with replaced([Rewrite((owner,), "encode_prompt", {}, around, around=True)]):
        assert WanPipeline.encode_prompt(None, 1) == (before, (1,))  # type: ignore[arg-type]
    assert WanPipeline.encode_prompt is before


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


def test_tensors_are_cut_and_filled_on_either_side():
    row = torch.tensor([[1, 2]])
    assert [resized(row, length, 9).tolist() for length in (1, 2, 3)] == [[[1]], [[1, 2]], [[1, 2, 9]]]
    assert [resized(row, length, 9, "left").tolist() for length in (1, 3)] == [[[2]], [[9, 1, 2]]]
