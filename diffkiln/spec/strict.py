"""What every declared model is made of: strict fields, conflicts between them, JSON values, and "one or a list of".

Strict: text is never read as a number, a list never as a single value, and an unknown field is an error.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    ModelWrapValidatorHandler,
    Tag,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails, InitErrorDetails, PydanticCustomError

from diffkiln.guards.amounts import bytes_of
from diffkiln.spec.problems import refuse, show

Conflict = tuple[tuple[str, ...], PydanticCustomError]
"""Where in the model (a path of keys) and what is wrong there; `refuse` makes the second."""

MAX_ITEMS = 256
"""Most targets, or variants, that one spec may list."""


class Strict(BaseModel):
    """A frozen, strict model that reports conflicts between fields together with the problems of single fields."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @classmethod
    def conflicts(cls, given: Mapping[str, Any]) -> Iterator[Conflict]:
        """Yields (path, refusal) pairs for combinations of the `given` fields (those not null) that are not allowed."""
        yield from ()

    @model_validator(mode="wrap")
    @classmethod
    def _collect(cls, data: Any, handler: ModelWrapValidatorHandler[Any]) -> Any:
        if not isinstance(data, dict):
            return handler(data)
        given = {name: value for name, value in data.items() if value is not None}
        found = [InitErrorDetails(type=error, loc=path, input=data) for path, error in cls.conflicts(given)]
        if not found:
            return handler(data)
        try:
            handler(data)
        except ValidationError as error:
            found = [*map(_again, error.errors(include_url=False)), *found]
        raise ValidationError.from_exception_data(cls.__name__, found)


def _again(detail: ErrorDetails) -> InitErrorDetails:
    """Returns an error of pydantic in the form in which it can be raised again."""
    context = detail.get("ctx", {})
    kind = refuse(context["reason"], context["mend"]) if detail["type"] == "refused" else detail["type"]
    return InitErrorDetails(type=kind, loc=detail["loc"], input=detail["input"], ctx=context)


def freeze(value: Any) -> Any:
    """Returns a JSON value with tuples instead of lists. Raises for a value that JSON cannot hold."""
    if isinstance(value, list | tuple):
        return tuple(freeze(item) for item in value)
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            raise refuse("has a key that is not text")
        return {key: freeze(item) for key, item in value.items()}
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    raise refuse(f"{show(value)} is not a JSON value")


def _few_and_distinct(items: tuple[Any, ...]) -> tuple[Any, ...]:
    if not 1 <= len(items) <= MAX_ITEMS:
        raise refuse(f"must have 1 to {MAX_ITEMS} items, not {len(items)}")
    for index, item in enumerate(items):
        if item in items[:index]:
            raise refuse(f"item {index} repeats item {items.index(item)}", "Remove one of the two")
    return items


def _number(value: Any) -> str:
    return "many" if isinstance(value, list | tuple) else "one"


Json = Annotated[Any, BeforeValidator(freeze)]
"""Any JSON value, with tuples for its lists."""


def in_bytes(value: Any) -> Any:
    """Returns text such as "8GiB" as a number of bytes; what is no text stays. Refuses text that is no amount."""
    if not isinstance(value, str):
        return value
    try:
        return bytes_of(value)
    except ValueError as error:
        reason, _, hint = str(error).partition(". ")
        raise refuse(reason, hint) from None


Amount = Annotated[
    int,
    Field(gt=0),
    BeforeValidator(in_bytes, json_schema_input_type=str | int),
]
"""Bytes of memory, or text such as "8GiB"."""

_T = TypeVar("_T")
_One = Annotated[_T, Tag("one")]
_Many = Annotated[
    tuple[_T, ...],
    Field(strict=False, json_schema_extra={"minItems": 1, "maxItems": MAX_ITEMS, "uniqueItems": True}),
    AfterValidator(_few_and_distinct),
    Tag("many"),
]
OneOrMany = Annotated[_One[_T] | _Many[_T], Discriminator(_number)]
"""A value of the model or a list of distinct ones; `as_tuple` reads both."""


def as_tuple(value: _T | tuple[_T, ...]) -> tuple[_T, ...]:
    return value if isinstance(value, tuple) else (value,)
