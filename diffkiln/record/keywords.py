"""The keywords of a pipeline's call: which are prompts, and what a spec declares of the others that a caller gives.

A spec declares an image by its size, a tensor by its shape, a text by an example:

    "image": {"height": 512, "width": 512}, "prompt_embeds": {"shape": [1, 77, 768]}, "lyrics": {"text": "la la"}

A list of sizes or shapes stands for a list. Whatever else it gives is fixed.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from typing import Any

from diffkiln.program import TensorType
from diffkiln.program.images import IMAGES, MAX_SIDE

#: The keywords that are prompts wherever a call has them. Others are where their text reaches a tokenizer.
PROMPTS = ("prompt", "prompt_2", "prompt_3", "prompt_4")
NEGATIVES = ("negative_prompt", "negative_prompt_2", "negative_prompt_3", "negative_prompt_4")

#: One tensor, or a list of them.
Tensors = TensorType | tuple[TensorType, ...]

_SIDES = {"height", "width"}
#: The types of elements that a declared tensor may have; the first is that of one whose type is not said.
DTYPES = ("float32", "bfloat16", "float16", "float64", "int64", "int32", "uint8", "bool")
#: More dimensions, and more in one of them, than any input has.
_MOST_DIMENSIONS, _LARGEST = 8, 2**31
#: Keywords that take the place of all prompts, or of all negative ones: diffusers refuses both together.
_ENCODED = re.compile(r"(negative_)?(prompt_embeds|encoder_hidden_states)(_\w+)?")


def parameters_of(pipe: Any) -> dict[str, inspect.Parameter]:
    """Returns the keywords of a pipeline's call, or of that of a class, by name."""
    kind = pipe if isinstance(pipe, type) else type(pipe)
    call = inspect.signature(getattr(kind, "__call__")).parameters.values()  # noqa: B004, B009
    return {item.name: item for item in call if item.name != "self" and item.kind is not item.VAR_KEYWORD}


def takes_images(parameter: inspect.Parameter) -> bool:
    """Returns True if the keyword's annotation names images."""
    return parameter.name in IMAGES or "PIL" in str(parameter.annotation)


def is_image(value: Any, parameter: inspect.Parameter | None) -> bool:
    """Returns True if a value in a spec stands for an image or a list of them, rightly or not."""
    if parameter is not None and parameter.name in IMAGES:
        return value is not None
    listed = images_in(value)
    sized = bool(listed) and all(isinstance(item, Mapping) and set(item) <= _SIDES for item in listed)
    return sized and (any(listed) or (parameter is not None and takes_images(parameter)))


def images_in(value: Any) -> list[Any]:
    """Returns what stands for each image in a value of a spec: one, a list, or a list of lists, with null where a place
    has no image."""
    if not isinstance(value, list | tuple):
        return [value]
    rows = [images_in(item) if isinstance(item, list | tuple) else [item] for item in value]
    nested = any(isinstance(item, list | tuple) for item in value)
    return [item for row in rows for item in row if item is not None or not nested]


def is_size(value: Any) -> bool:
    """Returns True if this is the size of an image, or leaves it to the variant's own."""
    if not isinstance(value, Mapping) or set(value) - _SIDES:
        return False
    return all(type(side) is int and 0 < side < MAX_SIDE for side in value.values())


def is_tensor(value: Any) -> bool:
    """Returns True if a value in a spec stands for a tensor or a list of them, rightly or not."""
    listed = _listed(value)
    return bool(listed) and all(isinstance(item, Mapping) and "shape" in item for item in listed)


def tensors_of(value: Any) -> Tensors | None:
    """Returns the types of what stands for a tensor or a list of them; None where a shape or a type is none."""
    types = [_type_of(item) for item in _listed(value)]
    if None in types:
        return None
    return tuple(types) if isinstance(value, list | tuple) else types[0]  # type: ignore[return-value]


def is_text(value: Any) -> bool:
    """Returns True if a value in a spec says that the caller gives a text."""
    return isinstance(value, Mapping) and set(value) == {"text"}


def as_json(tensors: Mapping[str, Tensors]) -> dict[str, Any]:
    """Returns the types of tensors as a spec says them."""

    def written(types: Tensors) -> Any:
        if isinstance(types, TensorType):
            return {"shape": list(types.shape), "dtype": types.dtype}
        return [written(each) for each in types]

    return {keyword: written(types) for keyword, types in tensors.items()}


def encoded(tensors: Mapping[str, Tensors]) -> Iterator[str]:
    """Yields the prompts that are not given beside these tensors, since the tensors are what becomes of them."""
    found = [match for match in map(_ENCODED.fullmatch, tensors) if match]
    yield from PROMPTS if any(not match[1] for match in found) else ()
    yield from NEGATIVES if any(match[1] for match in found) else ()


def withheld_by(fixed: Mapping[str, str]) -> Iterator[str]:
    """Yields the prompts that callers do not give, since the spec fixes them: all of a kind where the first is fixed,
    for a pipeline takes the first where another is not given."""
    yield from fixed
    for kind in (PROMPTS, NEGATIVES):
        yield from kind if kind[0] in fixed else ()


def twice_the_tensors(tensors: Mapping[str, Tensors], batch: int) -> dict[str, Tensors]:
    """Returns the types for twice as many prompts: those that have a row for each have twice as many rows."""

    def doubled(types: Tensors) -> Tensors:
        if isinstance(types, tuple):
            return tuple(doubled(each) for each in types)  # type: ignore[misc]
        rows, *rest = types.shape or (0,)
        return TensorType(types.dtype, (2 * rows, *rest)) if rows == batch else types

    return {keyword: doubled(types) for keyword, types in tensors.items()}


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _type_of(value: Mapping[str, Any]) -> TensorType | None:
    shape, dtype = value["shape"], value.get("dtype", DTYPES[0])
    if set(value) - {"shape", "dtype"} or not isinstance(shape, list | tuple) or len(shape) > _MOST_DIMENSIONS:
        return None
    if not all(type(size) is int and 0 < size < _LARGEST for size in shape):
        return None
    return TensorType(dtype, tuple(shape)) if dtype in DTYPES else None
