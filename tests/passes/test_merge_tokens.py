"""merge_tokens: fixed shapes, tokens that are alike, exact where nothing differs."""

import pytest
import torch

from diffkiln.errors import IllegalPlan, SpecError
from diffkiln.interpreter.layers.merging import _Pairs
from tests.passes.calls import call_of, distance, replays, result_of
from tests.passes.plans import both, checked, ghost, placed, real, types

MERGE = {"name": "merge_tokens", "component": "unet"}


def test_ghost_and_module_come_out_alike_and_replay():
    plan = ghost("sdxl")
    steps = checked(plan, MERGE)
    shadow, module = plan.modules["unet"], real("sdxl", "unet")
    steps[0].step.apply(shadow)
    steps[0].step.apply(module)
    assert types(shadow) == types(module) == types(real("sdxl", "unet")), "no weight changes"
    leaves, structure = call_of("sdxl", "unet")
    recorded = replays(shadow, module, leaves, structure)
    kinds = {op.name for region in recorded.regions.values() for op in region.ops}
    assert {"aten.scatter_add.default", "aten.argsort.stable"} <= kinds


def test_attention_runs_over_fewer_tokens():
    _, module = both("sdxl", "unet", MERGE | {"ratio": 0.5})
    seen = []
    attention = next(part for name, part in module.named_modules() if name.endswith("attn1"))
    attention.to_q.register_forward_hook(lambda _module, args, _result: seen.append(args[0].shape[1]))
    leaves, structure = call_of("sdxl", "unet")
    merged = result_of(module, leaves, structure)
    fewer, seen[:] = seen[0], []
    plain = real("sdxl", "unet")
    attention = next(part for name, part in plain.named_modules() if name.endswith("attn1"))
    attention.to_q.register_forward_hook(lambda _module, args, _result: seen.append(args[0].shape[1]))
    unmerged = result_of(plain, leaves, structure)
    assert fewer == seen[0] - seen[0] // 2
    assert 0 < distance(merged, unmerged) < 1


def test_tokens_that_are_equal_come_back_exactly():
    generator = torch.Generator().manual_seed(0)
    kinds = torch.randn(1, 8, 16, generator=generator)
    tokens = kinds.repeat_interleave(4, dim=1)  # fours of equal tokens, the first of each is one to merge into
    pairs = _Pairs(tokens, 24)
    merged = pairs.merge(tokens)
    assert merged.shape == (1, 8, 16)
    torch.testing.assert_close(merged, kinds)
    torch.testing.assert_close(pairs.unmerge(merged), tokens)


def test_every_token_keeps_its_place():
    tokens = torch.randn(2, 24, 8, generator=torch.Generator().manual_seed(1))
    pairs = _Pairs(tokens, 10)
    back = pairs.unmerge(pairs.merge(tokens))
    staying = pairs.others[pairs.staying]
    for row in range(2):
        assert torch.equal(back[row, staying[row]], tokens[row, staying[row]])


def test_it_is_for_unets():
    plan = ghost("flux")
    with pytest.raises(IllegalPlan, match="for UNets, and FluxTransformer2DModel is none"):
        checked(plan, MERGE | {"component": "transformer"})


def test_a_pattern_that_matches_no_block_is_refused():
    plan = ghost("sdxl")
    with pytest.raises(IllegalPlan, match=r"blocks\[0\]: the pattern 'down_blocks\.9\.\*' matches no block"):
        checked(plan, MERGE | {"blocks": ["down_blocks.9.*"]})


@pytest.mark.parametrize("ratio", [0, 0.9, -1])
def test_more_tokens_than_there_are_to_merge_is_a_bad_spec(ratio):
    with pytest.raises(SpecError):
        placed(MERGE | {"ratio": ratio})
