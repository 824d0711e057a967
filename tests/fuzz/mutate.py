"""Changes to inputs that keep their form: JSON stays JSON, so that they get past the parser to what lies behind it."""

from __future__ import annotations

import json
import struct
from random import Random
from typing import Any

#: What readers stumble over: bounds of integers, what compares oddly, names that mean something, empty things.
ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2**31, 2**53, 2**63, 2**64, 10**30, 0.5, -0.0, 1e308, float("nan"), float("inf"),
    "", "\0", "\ud800", "../x", "a" * 300, "%0", "@x", "#x", "cpu", "cuda:9", "==.", ">=x", "\u0661", "U16",
    "float32[2]", [], {}, [[]], [0], {"": 0}, {"dtype": "float99"}, {"str": "x"}, {"dict": {}},
)  # fmt: skip


def json_text(data: bytes, seed: int) -> bytes:
    """The JSON text with one to three of its values changed; other bytes as they are."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return data
    random = Random(seed)
    for _ in range(random.randint(1, 3)):
        value = _edited(value, random)
    return json.dumps(value).encode()


def safetensors_file(data: bytes, seed: int) -> bytes:
    """A safetensors file with values of its header changed, and the header's length with them."""
    if len(data) < 8:
        return data
    (length,) = struct.unpack("<Q", data[:8])
    header = json_text(data[8 : 8 + length], seed)
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


def some_bytes(data: bytes, seed: int) -> bytes:
    """A few bytes put in the place of others."""
    random = Random(seed)
    start = random.randint(0, len(data))
    return data[:start] + random.randbytes(random.randint(0, 4)) + data[start + random.randint(0, 4) :]


def _edited(value: Any, random: Random) -> Any:
    """The value with one change somewhere in it."""
    places = _places(value)
    if not places:
        return random.choice(ODD)
    holder, key = random.choice(places)
    match random.randrange(5):
        case 0:
            del holder[key]
        case 1:  # what stands elsewhere; copied, since JSON has no cycles
            other, its = random.choice(places)
            holder[key] = json.loads(json.dumps(other[its]))
        case 2 if isinstance(holder, dict):
            holder[random.choice(_keys(places) or ["x"])] = holder[key]
        case 3 if isinstance(holder[key], int):
            holder[key] += random.choice([-1, 1, 2**32])
        case _:
            holder[key] = json.loads(json.dumps(random.choice(ODD)))
    return value


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every container in the value with each of its keys or indices."""
    found: list[tuple[Any, Any]] = []
    waiting = [value]
    while waiting:
        item = waiting.pop()
        keys = list(item) if isinstance(item, dict) else range(len(item)) if isinstance(item, list) else ()
        found += [(item, key) for key in keys]
        waiting += [item[key] for key in keys]
    return found


def _keys(places: list[tuple[Any, Any]]) -> list[str]:
    return [key for _, key in places if isinstance(key, str)]
