"""HiDream's experts, each of which sees all tokens and counts where one was sent to it."""

import pytest
import torch

from diffkiln.families.hidream import _moe_infer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("experts", "activated"), [(2, 2), (4, 2), (4, 1)])
def test_gives_what_diffusers_gives(experts, activated, dtype):
    from diffusers.models.transformers.transformer_hidream_image import MOEFeedForwardSwiGLU

    torch.manual_seed(0)
    module = MOEFeedForwardSwiGLU(16, 32, experts, activated, _force_inference_output=True).to(dtype).eval()
    tokens = torch.randn(24, 16).to(dtype)
    sent = torch.stack([torch.randperm(experts)[:activated] for _ in range(24)]).view(-1)
    weights = torch.rand(24 * activated, 1)
    with torch.no_grad():
        wanted, found = module.moe_infer(tokens, sent, weights), _moe_infer(module, tokens, sent, weights)
    assert found.dtype == wanted.dtype
    torch.testing.assert_close(found, wanted)
