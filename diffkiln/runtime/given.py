"""What a caller gives besides prompts and images: tensors of declared shapes; and which keyword is what."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from diffkiln.errors import CallError
from diffkiln.interpreter.aten import dtype_of, type_of
from diffkiln.program import Input

LATENTS = "latents"
_PROMPT = re.compile(r"(negative_)?prompt(_\d)?")
_NEGATIVE = "negative_"
_ENCODED = re.compile(r"(negative_)?(pooled_)?prompt_(embeds|attention)\w*|\w*_embeds(_mask)?|encoder_hidden_states")


def is_negative(keyword: str) -> bool:
    """Returns True if a text says what is not wanted."""
    return keyword.startswith(_NEGATIVE)


def is_prompt(keyword: str) -> bool:
    """Returns True if every pipeline that has this keyword takes a text by it."""
    return _PROMPT.fullmatch(keyword) is not None


def tensor_inputs(inputs: Sequence[Input]) -> dict[str, list[Input]]:
    """Returns the inputs that are tensors, by keyword: one, or those of a list in its order."""
    found: dict[str, dict[int, Input]] = {}
    for item in inputs:
        if item.source.get("kind") == "tensor":
            found.setdefault(item.source["keyword"], {})[item.source.get("index", 0)] = item
    return {keyword: [items[index] for index in sorted(items)] for keyword, items in found.items()}


def tensor_list(keyword: str, value: Any, wanted: Sequence[Input]) -> list[torch.Tensor]:
    """Returns the tensors that a caller gives for one keyword, on whatever device.

    Args:
        keyword: for messages.
        value: a tensor, an array or nested lists of numbers; for several inputs, a list of such.
        wanted: the inputs that they are for.

    Raises:
        CallError: it is none, or of another shape.
    """
    listed = "index" in wanted[0].source
    if not listed:
        return [_tensor(keyword, value, wanted[0])]
    if not isinstance(value, list | tuple) or len(value) != len(wanted):
        found = len(value) if isinstance(value, list | tuple) else type(value).__name__
        raise CallError(f"{keyword}: {found} is given, this variant takes a list of {len(wanted)} tensors")
    return [
        _tensor(f"{keyword}[{index}]", each, item) for index, (each, item) in enumerate(zip(value, wanted, strict=True))
    ]


def _tensor(keyword: str, value: Any, item: Input) -> torch.Tensor:
    tensor = _as_tensor(keyword, value)
    if tuple(tensor.shape) != item.type.shape:
        raise CallError(
            f"{keyword}: shape {tuple(tensor.shape)}, this variant takes {item.type.shape}. Compile a variant for it"
        )
    dtype = dtype_of(item.type.dtype)
    if tensor.is_complex() or (tensor.is_floating_point() and not dtype.is_floating_point):
        raise CallError(f"{keyword}: {_name(tensor.dtype)}, this variant takes {item.type.dtype}")
    return tensor.to(dtype)


def _as_tensor(keyword: str, value: Any) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value.detach()
    try:
        array = np.asarray(value)
        if array.dtype.kind not in "fiub":
            raise TypeError
        return torch.from_numpy(np.array(array, order="C"))
    except (TypeError, ValueError, OverflowError):
        raise CallError(f"{keyword}: {type(value).__name__} is neither a tensor nor an array of numbers") from None


def described(value: Any) -> Any:
    """Returns a keyword's value as an error shows it: of a tensor its type, never its numbers."""
    if isinstance(value, torch.Tensor):
        return _Shown(f"a tensor of {type_of(value)}")
    if isinstance(value, np.ndarray):
        return _Shown(f"an array of {value.dtype}{list(value.shape)}")
    if isinstance(value, list | tuple) and any(isinstance(item, torch.Tensor | np.ndarray) for item in value):
        return _Shown(f"a list of {len(value)} tensors")
    return value


def untaken(class_name: str, given: Mapping[str, Any]) -> Iterator[str]:
    """Yields what is said of tensors that no variant takes, and how a spec declares them."""
    for keyword, value in given.items():
        tensors = value if isinstance(value, list | tuple) else [value]
        if not _ENCODED.fullmatch(keyword) and not all(isinstance(item, torch.Tensor) for item in tensors):
            continue
        types = [type_of(item) for item in tensors if isinstance(item, torch.Tensor)]
        shapes = [f'{{"shape": {list(each.shape)}, "dtype": "{each.dtype}"}}' for each in types] or ['{"shape": […]}']
        shown = shapes[0] if isinstance(value, torch.Tensor) or not types else f"[{', '.join(shapes)}]"
        yield (
            f"{keyword}: no variant of this bundle of {class_name} takes it. Compile one that declares it: "
            f'"call": {{"{keyword}": {shown}}}'
        )


class _Shown(str):
    """A description that stands for itself in messages, without quotation marks."""

    def __repr__(self) -> str:
        return str(self)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
