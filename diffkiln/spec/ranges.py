"""Ranges of sizes: every size from the smallest to the largest, at a step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from pydantic import Discriminator, Field, Tag

from diffkiln.spec.problems import refuse
from diffkiln.spec.strict import Conflict, OneOrMany, Strict

# Far above what any pipeline or machine has; a slip of the finger is caught here and not by an allocation.
Count = Annotated[int, Field(ge=1, le=65_536)]

#: Most sizes that one entry of the inputs may stand for: each is recorded.
MAX_SIZES = 64


class Range(Strict):
    """The sizes from `min` to `max`, both included, at distances of `step`. Each is a variant."""

    min: Count = Field(description="The smallest size.")
    max: Count = Field(description="The largest size.")
    step: Count = Field(description="The distance from one size to the next.")

    @classmethod
    def conflicts(cls, given: Mapping[str, Any]) -> Iterator[Conflict]:
        numbers = [given.get(name) for name in ("min", "max", "step")]
        smallest, largest, step = numbers
        if not all(type(number) is int and number > 0 for number in numbers):
            return
        if smallest >= largest:  # type: ignore[operator]
            yield ("max",), refuse(f"is not above the smallest, {smallest}", "Give one size, or a larger one")
        elif (largest - smallest) % step:  # type: ignore[operator]
            nearest = largest - (largest - smallest) % step  # type: ignore[operator]
            yield ("step",), refuse(f"{step} does not lead from {smallest} to {largest}", f'Set "max" to {nearest}')

    @property
    def sizes(self) -> range:
        return range(self.min, self.max + 1, self.step)


Size = Annotated[
    Annotated[Count, Tag("size")] | Annotated[Range, Tag("range")],
    Discriminator(lambda value: "range" if isinstance(value, (dict, Range)) else "size"),
]
"""A size, or a range of them."""


Tokens = OneOrMany[Annotated[int, Field(ge=0, le=65_536)]]
"""A number of tokens, or several."""


def sizes_of(size: int | Range | None) -> tuple[int | None, ...]:
    return tuple(size.sizes) if isinstance(size, Range) else (size,)
