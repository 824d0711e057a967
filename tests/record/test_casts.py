"""Components that a call casts while it runs."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from diffkiln.errors import RecordError
from diffkiln.record.casts import Casts, casted


@pytest.fixture
def pipe():
    part = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).bfloat16()
    return SimpleNamespace(components={"vae": part, "scheduler": object()})


def types(module):
    return {tensor.dtype for tensor in module.state_dict().values() if tensor.is_floating_point()}


def test_weights_are_of_another_type_while_it_lasts(pipe):
    vae = pipe.components["vae"]
    before = dict(vae.named_parameters())
    with casted(vae, torch.float32):
        assert types(vae) == {torch.float32}
        assert vae[1].num_batches_tracked.dtype == torch.int64
    assert all(before[name] is parameter for name, parameter in vae.named_parameters())


def test_a_cast_there_and_back_is_noticed(pipe):
    vae, casts = pipe.components["vae"], Casts(pipe)
    with casts.watched():
        assert vae.to("cpu") is vae
        assert casts.of("vae") is None
        vae.to(dtype=torch.float32)
        assert (casts.of("vae"), types(vae)) == (torch.float32, {torch.float32})
        vae.to(torch.bfloat16)
        assert (casts.of("vae"), types(vae)) == (None, {torch.bfloat16})
        vae.to(torch.float32)
    assert types(vae) == {torch.bfloat16}
    assert "to" not in vae.__dict__


def test_a_cast_that_loses_digits_is_refused(pipe):
    with Casts(pipe).watched(), pytest.raises(RecordError, match="casts vae from bfloat16 to float16 while it runs"):
        pipe.components["vae"].to(torch.float16)
