"""What is known of tokens that depend on a prompt: those of the text around it, and that the prompt holds no marks.

Where an image stands in a text is read off its tokens: `ids == image_token_id`. No prompt may hold such a mark, so the
answer is the same for all prompts of one length.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

#: A token of the prompt.
UNKNOWN = -1
#: Operators that move numbers and change none, but for their type.
MOVES = frozenset(
    f"aten.{name}"
    for name in (
        "select.int", "slice.Tensor", "index.Tensor", "index_select.default", "unsqueeze.default", "squeeze.default",
        "squeeze.dim", "view.default", "reshape.default", "expand.default", "cat.default", "stack.default",
        "repeat.default", "clone.default", "contiguous.default", "permute.default", "transpose.int", "split.Tensor",
        "unbind.int", "to.dtype", "to.device", "to.dtype_layout", "_to_copy.default",
    )
)  # fmt: skip


@dataclass(frozen=True)
class Shadow:
    """The known tokens of a marked tensor.

    Attributes:
        tokens: of its shape; those of the prompt are UNKNOWN.
        is_mark: whether no prompt holds a token of this number, which it sees to from then on.
    """

    tokens: torch.Tensor
    is_mark: Callable[[int], bool]

    def equal(self, number: Any) -> torch.Tensor | None:
        """Returns where the tokens have this number; None where it follows the prompt."""
        if not isinstance(number, int) or not self.is_mark(number):
            return None
        return self.tokens.eq(number)


def moved(func: Any, name: str, args: Any, kwargs: Mapping[str, Any], of: Callable[[Any], Shadow | None]) -> Any:
    """Returns the shadows of an operation's results, one or a list of them; None where they have none.

    Args:
        func: the operator.
        name: its name.
        args: its arguments.
        kwargs: named ones.
        of: gives the shadow of a tensor, and None of what has none.
    """
    if name not in MOVES:
        return None
    found: list[Shadow] = []

    def plain(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return type(value)(map(plain, value))
        shadow = of(value) if isinstance(value, torch.Tensor) else None
        if shadow is None:
            return value
        found.append(shadow)
        return shadow.tokens

    given = plain(tuple(args))
    if not found:
        return None
    try:
        result = func(*given, **kwargs)
    except Exception:  # beside it stands what depends on the request in another way
        return None
    is_mark = found[0].is_mark
    if isinstance(result, torch.Tensor):
        return Shadow(result, is_mark)
    return [Shadow(each, is_mark) for each in result]
