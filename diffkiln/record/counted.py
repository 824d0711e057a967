"""Prompts of a fixed number of tokens: masks of tokens are constants then, and lengths that follow from them are known.

A pipeline may give its components as many tokens as the prompt has, cut what it pads, or ask whether anything was
padded. With the number of tokens known all of that has one answer, and the call is a straight line again. Each number
is a variant, which the runtime picks by the tokens of the prompt.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from diffkiln.errors import DataDependent, RecordError
from diffkiln.program.text_rules import COUNTED
from diffkiln.record.selecting import SELECTS, by_position

#: Numbers in the largest mask that decides which program a component runs.
_LARGEST = 1 << 20


@dataclass(frozen=True)
class Counted:
    """The numbers of tokens of a variant's prompts.

    Attributes:
        tokens: by the keyword of the prompt, without the tokens of the text around it.
        every: also of texts that are padded to a length of their own.
    """

    tokens: Mapping[str, int]
    every: bool = False

    def applies(self, entry: Mapping[str, Any]) -> bool:
        """Returns True if the length of this text is fixed."""
        return "quotations" not in entry and (self.every or entry["padding"] != "max_length")

    def fixed(
        self, entry: Mapping[str, Any], count: Callable[[str], int], kwargs: Mapping[str, Any]
    ) -> tuple[dict[str, Any], torch.Tensor]:
        """Returns a text's entry with the length of each row, and the mask of its tokens, int64 [rows, length].

        Args:
            entry: of `Program.texts`.
            count: returns the number of a text's tokens.
            kwargs: those of the tokenizer's call.

        Raises:
            DataDependent: a row is a prompt whose length is not known.
        """
        around = [count(row["text"] if "text" in row else row["prefix"] + row["suffix"]) for row in entry["rows"]]
        totals = [base + self._own(row) for base, row in zip(around, entry["rows"], strict=True)]
        most = entry["max_length"]
        cut = most if entry["truncation"] else None
        if cut is not None:
            totals = [min(total, cut) for total in totals]
        length = max(totals)
        if entry["padding"] == "max_length" and most is not None:
            length = max(length, most)
        elif multiple := kwargs.get("pad_to_multiple_of"):
            length += -length % multiple
        if length == 0:
            raise RecordError(f"{entry['tokenizer']} is given a text without any tokens")
        if entry["padding"] in ("none", "do_not_pad") and len(set(totals)) > 1:
            raise DataDependent(f"{entry['tokenizer']} is called without padding for texts of several lengths")
        right = entry["padding_side"] == "right"
        rows = [[1] * total + [0] * (length - total) for total in totals]
        mask = torch.tensor([row if right else row[::-1] for row in rows], dtype=torch.int64)
        padding = {"pad_id": entry["pad_id"] or 0, "pad_token": entry["pad_token"] or "", "pad_type_id": 0}
        own = {name: value for name, value in padding.items() if entry[name] is None}
        fixed = {"padding": "max_length", "max_length": length, "truncation": False}
        return {**entry, **own, **fixed, COUNTED: totals, "around": around, "cut": cut}, mask

    def _own(self, row: Mapping[str, Any]) -> int:
        """Returns the tokens of a row's prompt."""
        if "text" in row:
            return 0
        if row["keyword"] not in self.tokens:
            raise DataDependent(
                f"the call reads {row['keyword']}, and the number of its tokens is not said. Add "
                '"negative_prompt_tokens" to the inputs'
            )
        return self.tokens[row["keyword"]]


def decisive(
    leaves: Sequence[Any], is_marked: Callable[[Any], bool], dimensions: int | None
) -> dict[int, torch.Tensor]:
    """Returns the arguments of a component whose values may decide its shapes, by their places: masks and positions
    that no request changes, of so many dimensions or more; nothing where `dimensions` is None."""
    if dimensions is None:
        return {}
    with _disable_current_modes():
        return {
            index: leaf
            for index, leaf in enumerate(leaves)
            if isinstance(leaf, torch.Tensor)
            and not is_marked(leaf)
            and not leaf.is_meta
            and leaf.ndim >= dimensions
            and _is_mask(leaf)
        }


def _is_mask(tensor: torch.Tensor) -> bool:
    if not 0 < tensor.numel() <= _LARGEST:
        return False
    if not tensor.is_floating_point():
        return not tensor.is_complex()
    return bool(tensor.eq(0).logical_or(tensor.eq(1)).all())


def digest_of(decided: Mapping[int, torch.Tensor]) -> str:
    """Returns the part of a component's key that these values are; "" for none."""
    if not decided:
        return ""
    digest = hashlib.blake2b(digest_size=16)
    with _disable_current_modes():
        for position, tensor in decided.items():
            digest.update(f"{position} {tuple(tensor.shape)} {tensor.dtype} ".encode())
            dense = tensor.clone(memory_format=torch.contiguous_format)
            digest.update(dense.reshape(-1).view(torch.uint8).numpy().tobytes())
    return f"|{digest.hexdigest()}"


class ByPosition(TorchDispatchMode):
    """A mode in which masks without marks select by position, so that what they select has a shape."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        name = f"{func.namespace}.{func._opname}.{func._overloadname}"
        if name in SELECTS:
            func, _, args, given = by_position(func, name, args, given, _is_fake)
        return func(*args, **given)


def _is_fake(value: Any) -> bool:
    return isinstance(value, FakeTensor)
