"""Reads what was measured when a bundle was built from `build.json`, which strangers may have written.

What is not as expected is left out. The file is outside the bundle's id, and decides nothing but what plans of memory
say: a wrong number there has a limit refused, or passed over.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

#: The key of what was measured of a process's memory, by target, and the most that is taken for a measurement.
WORKING_MEMORY = "working_memory"
_MOST = {"bytes": 2**40, "threads": 4096}


@dataclass(frozen=True)
class Costs:
    """The values of one metric, which a gate of quality limits.

    Attributes:
        metric: its name.
        gate: the limit in words, such as "at least 28".
        floor: the limit, if it is the lowest value that is accepted.
        cumulative: after each pass, by the pass's name, and of the finished bundle; None where it was not measured.
        each: with each pass alone; empty where that was not asked for.
    """

    metric: str
    gate: str
    floor: float | None
    cumulative: tuple[tuple[str, float | None], ...]
    each: Mapping[str, float | None]


def costs_of(build: Mapping[str, Any]) -> list[Costs]:
    """Returns a table for each gate of quality; none for a spec without gates."""
    return list(_tables(build))


def sizes_of(build: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Returns the bytes of every component's weights: of the source, and after each pass that changed them. Empty where
    the file does not tell.
    """
    given, passes = build.get("weights"), build.get("passes")
    sizes = {name: _number(size) for name, size in given.items()} if isinstance(given, dict) else {}
    now = {name: size for name, size in sizes.items() if size is not None}
    found = {"source": dict(now)} if now else {}
    for number, row in enumerate(passes if isinstance(passes, list) else (), 1):
        if not isinstance(row, dict):
            continue
        name, component, size = str(row.get("name")), str(row.get("component")), _number(row.get("bytes"))
        if size is not None and size != now.get(component, size):
            now[component] = size
            found[f"{number}: {name}"] = dict(now)
    return found


def working_memory_of(build: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    """Returns the working memory that was measured, by target: its `bytes`, and the `threads` that computed."""
    rows = build.get(WORKING_MEMORY)
    return {
        str(target): {name: row[name] for name in _MOST}
        for target, row in (rows.items() if isinstance(rows, dict) else ())
        if isinstance(row, dict) and all(_is_amount(row.get(name), most) for name, most in _MOST.items())
    }


def _is_amount(value: Any, most: int) -> bool:
    return type(value) is int and 0 < value <= most


def _tables(build: Mapping[str, Any]) -> Iterator[Costs]:
    ledger = build.get("ledger")
    tables = ledger.get("tables") if isinstance(ledger, dict) else None
    for table in tables if isinstance(tables, list) else ():
        if not isinstance(table, dict) or not isinstance(table.get("metric"), str):
            continue
        low, high = _number(table.get("at_least")), _number(table.get("at_most"))
        gate = _limit(low, high)
        rows = tuple(_rows(table.get("cumulative")))
        if gate and rows:
            yield Costs(table["metric"], gate, low, rows, dict(_rows(table.get("each"))))


def _limit(low: float | None, high: float | None) -> str:
    if low is not None:
        return f"at least {low:g}"
    return "" if high is None else f"at most {high:g}"


def _rows(given: Any) -> Iterator[tuple[str, float | None]]:
    for row in given if isinstance(given, list) else ():
        if isinstance(row, dict) and isinstance(row.get("pass"), str):
            yield row["pass"], _number(row.get("value"))


def _number(value: Any) -> float | None:
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if plain and math.isfinite(value) else None
