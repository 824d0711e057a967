"""Tokens as Python lists, which become tensors again where torch makes them."""

import pytest
import torch

from diffkiln.errors import DataDependent
from diffkiln.record.tokens import as_tensor, holds_tokens, tokens_of

ROW = torch.arange(10, 15)


@pytest.mark.parametrize(
    ("value", "numbers"),
    [
        (lambda tokens: tokens, [10, 11, 12, 13, 14]),
        (lambda tokens: [*tokens, 7, 8], [10, 11, 12, 13, 14, 7, 8]),
        (lambda tokens: [1, *tokens[3:], *tokens[:2]], [1, 13, 14, 10, 11]),
        (lambda tokens: tokens[::2], [10, 12, 14]),
        (lambda tokens: [tokens[:2], [3, tokens[4]]], [[10, 11], [3, 14]]),
    ],
)
def test_lists_become_the_tensors_that_they_would_be(value, numbers):
    given = value(tokens_of(ROW))
    assert holds_tokens(given)
    assert as_tensor(given).tolist() == numbers
    assert as_tensor(given, torch.int32).dtype == torch.int32


@pytest.mark.parametrize("value", [[], [1, 2], "text", [[1], [2]], None])
def test_other_values_hold_no_tokens(value):
    assert not holds_tokens(value)


@pytest.mark.parametrize("read", [int, bool, float, lambda token: token == 3, lambda token: token < 3])
def test_a_token_is_not_read(read):
    with pytest.raises(DataDependent, match="reads a token of the prompt"):
        read(tokens_of(ROW)[0])
