"""Tokens that a pipeline asks for as Python lists: each is a place in a marked tensor until torch makes one of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch

from diffkiln.errors import DataDependent


class Token:
    """One token of a prompt, whose number no one may ask for.

    Args:
        row: the tokens of the prompt, int64 [tokens], marked.
        index: its place there.
    """

    __slots__ = ("index", "row")

    def __init__(self, row: torch.Tensor, index: int) -> None:
        self.row, self.index = row, index

    def _refuse(self, *_args: Any) -> NoReturn:
        raise DataDependent("the pipeline reads a token of the prompt, so its control flow may change with the prompt")

    __int__ = __index__ = __float__ = __bool__ = __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = _refuse  # type: ignore[assignment]
    __hash__ = None  # type: ignore[assignment]


def tokens_of(row: torch.Tensor) -> list[Token]:
    """Returns the tokens of a row as a list, as a tokenizer gives them where it is not asked for tensors."""
    return [Token(row, index) for index in range(row.shape[0])]


def holds_tokens(value: Any) -> bool:
    """Returns True for a list of tokens and numbers, and for a list of such lists."""
    if not isinstance(value, list | tuple):
        return False
    return any(isinstance(item, Token) or (isinstance(item, list | tuple) and holds_tokens(item)) for item in value)


def as_tensor(value: Sequence[Any], dtype: torch.dtype | None = None) -> torch.Tensor:
    """Returns what `torch.tensor` would give of a list of tokens and numbers."""
    if any(isinstance(item, list | tuple) for item in value):
        return torch.stack([as_tensor(row, dtype) for row in value])
    parts: list[torch.Tensor] = []
    index = 0
    while index < len(value):
        count = _run(value, index)
        first = value[index]
        if isinstance(first, Token):
            parts.append(first.row[first.index : first.index + count])
        else:
            parts.append(torch.full((1,), first, dtype=torch.int64))
        index += count
    whole = parts[0] if len(parts) == 1 else torch.cat(parts)
    return whole if dtype is None else whole.to(dtype)


def _run(value: Sequence[Any], start: int) -> int:
    """Returns how many items from `start` follow each other in one row; 1 for a number."""
    first = value[start]
    if not isinstance(first, Token):
        return 1
    count = 1
    while start + count < len(value):
        item = value[start + count]
        if not (isinstance(item, Token) and item.row is first.row and item.index == first.index + count):
            break
        count += 1
    return count
