"""Between which numbers a marked value lies, whatever the request: truth values, and images whose range is checked.

Some pipelines look through an image for numbers that are out of range, and raise. The runtime takes no such image, so
the answer is the same for every request.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diffkiln.program import Input, Op, Ref, TensorType
from diffkiln.record.shadows import MOVES

#: The least and the greatest number that there can be.
Bounds = tuple[float, float]
_BOOL = "bool"
#: Operators that choose one of a tensor's numbers, besides those that move them.
_CHOOSES = frozenset(f"aten.{name}.default" for name in ("min", "max", "amin", "amax"))
#: Casts, which keep the order of numbers where they are to these types.
_CASTS = frozenset(("aten.to.dtype", "aten.to.device", "aten.to.dtype_layout", "aten._to_copy.default"))
_FLOATS = ("float64", "float32", "bfloat16", "float16")
_COMPARISONS: Mapping[str, Callable[[float, float], bool]] = {
    "aten.lt.Scalar": operator.lt,
    "aten.le.Scalar": operator.le,
    "aten.gt.Scalar": operator.gt,
    "aten.ge.Scalar": operator.ge,
}


@dataclass(frozen=True)
class Known:
    """What a tape has written down so far."""

    inputs: Sequence[Input]
    ops: Sequence[Op]
    types: Mapping[str, TensorType]

    def truth(self, ref: Ref) -> bool | None:
        """Returns the truth of a value of one element; None where it may follow the request."""
        makers = {output: op for op in self.ops for output in op.outputs}
        maker = makers.get(ref.name)
        if maker is None or maker.name not in _COMPARISONS or not isinstance(maker.args[0], Ref):
            return None
        number, bounds = maker.args[1], self._bounds(maker.args[0], makers)
        if bounds is None or not isinstance(number, int | float):
            return None
        found = {_COMPARISONS[maker.name](end, number) for end in bounds}
        return found.pop() if len(found) == 1 else None

    def _bounds(self, ref: Ref, makers: Mapping[str, Op]) -> Bounds | None:
        """Returns the bounds of a value, by those of what it is made of."""
        if self.types[ref.name].dtype == _BOOL:
            return 0, 1
        maker = makers.get(ref.name)
        if maker is None:
            return next((_of_image(item) for item in self.inputs if item.name == ref.name), None)
        if maker.name not in MOVES | _CHOOSES or (maker.name in _CASTS and self.types[ref.name].dtype not in _FLOATS):
            return None
        found = [self._bounds(each, makers) for each in _tensors(maker)]
        ends = [bounds for bounds in found if bounds is not None]
        return (min(low for low, _ in ends), max(high for _, high in ends)) if len(ends) == len(found) > 0 else None


def _tensors(op: Op) -> list[Ref]:
    first = op.args[0]
    return [each for each in (first if isinstance(first, tuple) else (first,)) if isinstance(each, Ref)]


def _of_image(item: Input) -> Bounds | None:
    source: Mapping[str, Any] = item.source
    if source.get("kind") != "image" or source["scaled"] is not None:
        return None
    return (-1, 1) if source["normalize"] else (0, 1)
