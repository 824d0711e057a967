"""JSON from a stranger: bounded in size and depth, and with one meaning only.

Python's parser accepts duplicate keys, `NaN` and `1e999`, and runs out of stack on deep nesting. Each of
those is an error here, found before it can do harm.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any, NoReturn

MAX_DEPTH = 64
# Sixteen megabytes of `[],` would otherwise become half a gigabyte of empty lists.
MAX_CONTAINERS = 1_000_000

# A string is taken whole, closed or not, so that brackets inside it do not count and so that the scan stays
# linear on text that is all quotes and backslashes.
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


class StrictJSONError(ValueError):
    """Text that is not acceptable JSON; the message says why."""


def loads(data: bytes, *, max_bytes: int, max_depth: int = MAX_DEPTH, constants: bool = False) -> Any:
    """Parses `data`. Raises `StrictJSONError`, never `RecursionError`.

    With `constants`, Python's spellings of NaN and infinity are accepted: configurations of schedulers hold them.
    """
    if len(data) > max_bytes:
        raise StrictJSONError(f"{len(data)} bytes, more than the {max_bytes} that are accepted")
    _check_nesting(data, max_depth)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise StrictJSONError(f"not UTF-8 at byte {error.start}") from error
    try:
        constant = float if constants else _no_constant
        return json.loads(text, object_pairs_hook=_unique_keys, parse_constant=constant, parse_float=_finite)
    except StrictJSONError:
        raise
    except ValueError as error:
        raise StrictJSONError(f"not JSON: {error}") from error


def _check_nesting(data: bytes, max_depth: int) -> None:
    brackets = _STRING.sub(b"", data).translate(None, _NO_BRACKETS)
    if brackets.count(b"[") + brackets.count(b"{") > MAX_CONTAINERS:
        raise StrictJSONError(f"more than {MAX_CONTAINERS} objects and lists")
    depth = 0
    for bracket in brackets:
        depth += 1 if bracket in b"[{" else -1
        if depth > max_depth:
            raise StrictJSONError(f"nested deeper than {max_depth} levels")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise StrictJSONError(f"the key {key[:100]!r} appears twice in one object")
            seen.add(key)
    return result


def _no_constant(name: str) -> NoReturn:
    raise StrictJSONError(f"{name} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise StrictJSONError(f"the number {text[:40]} is out of range")
    return value
