"""Attention processors that a call swaps."""

from __future__ import annotations

from torch import nn

from diffkiln.record.processors import processors_of, with_processors


class _Other:
    """An attention processor that a call gives and takes away."""


def test_attention_processors_of_a_call_are_given_and_taken_away():
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    own, other = _Other(), _Other()
    module[0].processor = own
    assert processors_of(module) == {"0": own}
    with with_processors(module, {"0": other, "7": other}):
        assert processors_of(module) == {"0": other}
    assert processors_of(module) == {"0": own}
