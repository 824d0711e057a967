"""Numbers that were measured several times: their median and their spread, and what stands where nothing was."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

#: What stands in the place of a number that there is none of.
NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Spread:
    """The median of several measurements, the lowest and the highest of them, and how many there were."""

    median: float
    lowest: float
    highest: float
    count: int

    def scaled(self, factor: float) -> Spread:
        """Returns the same in another unit: every number times `factor`."""
        return Spread(self.median * factor, self.lowest * factor, self.highest * factor, self.count)

    def as_json(self) -> dict[str, Any]:
        """Returns the numbers by their names, with six digits."""
        numbers = {name: _short(getattr(self, name)) for name in ("median", "lowest", "highest")}
        return {**numbers, "count": self.count}


def spread_of(values: Sequence[float]) -> Spread | None:
    """Returns the median and the spread of measurements; None if there are none."""
    return Spread(statistics.median(values), min(values), max(values), len(values)) if values else None


def _short(value: float) -> float:
    return float(f"{value:.6g}")
