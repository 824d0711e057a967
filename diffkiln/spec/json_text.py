"""Reading JSON from people and from strangers: bounded in size and depth, and nothing silently dropped."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from diffkiln.errors import Problem, SpecError
from diffkiln.spec.problems import MAX_PROBLEMS, path_to, show

MAX_BYTES = 1_000_000
MAX_DEPTH = 64
MAX_VALUES = 100_000

# A string (one that does not end runs to the end of the text) or a bracket. No input makes it backtrack.
_STRING_OR_BRACKET = re.compile(r'"[^"\\]*(?:\\.?[^"\\]*)*(?:"|\Z)|[\[\]{}]', re.DOTALL)


#: Longer than a path is on any system; what is longer is something else.
_MAX_PATH = 1024


class _Repeating(dict[str, Any]):
    """An object that names some of its keys twice."""

    repeated: tuple[str, ...] = ()


def read_file(path: Path) -> bytes:
    """Returns the bytes of a regular file of at most `MAX_BYTES`. Raises `SpecError` for anything else."""
    try:
        if not path.is_file():
            raise SpecError(problems=[_not_a_file(path)])
        with path.open("rb") as file:
            return file.read(MAX_BYTES + 1)  # one byte more tells a file that is too large
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise SpecError(problems=[Problem(_quoted(path), f"cannot be read: {reason}")]) from error


def _quoted(path: Path) -> str:
    """Returns the path as JSON, whole, since its end tells files apart. Text that is not a path is shown short."""
    text = str(path)
    return json.dumps(text, ensure_ascii=True) if len(text) <= _MAX_PATH and "\n" not in text else show(text)


def _not_a_file(path: Path) -> Problem:
    where = _quoted(path)
    if str(path).lstrip().startswith("{"):
        return Problem(where, "is not a path", "A str is taken as a path; give JSON as bytes or as a dict")
    if path.is_dir():
        return Problem(where, "is a directory", "Give the path of the JSON file in it")
    if path.exists():
        return Problem(where, "is not a regular file")
    return Problem(where, "there is no such file")


def read_json(text: bytes) -> Any:
    """Returns the JSON value of `text`. Raises `SpecError` if the text is not JSON, too long or too deep.

    Repeated keys and numbers that are not finite are kept: `flaws` finds them and knows their paths.
    """
    if len(text) > MAX_BYTES:
        raise SpecError(problems=[Problem("$", f"is longer than {MAX_BYTES} bytes")])
    try:
        decoded = text.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        where = f"byte {error.start}"
        raise SpecError(problems=[Problem(where, "is not UTF-8", "Save the file as UTF-8")]) from error
    if _depth(decoded) > MAX_DEPTH:
        raise SpecError(problems=[_too_deep("$")])
    try:
        return json.loads(decoded, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        hint = "JSON has neither comments nor trailing commas, and its strings are in double quotes"
        raise SpecError(problems=[Problem(where, f"is not JSON: {error.msg}", hint)]) from error
    except ValueError as error:  # Python's limit on the digits of an integer
        raise SpecError(problems=[Problem("$", "holds a number with thousands of digits")]) from error


def flaws(value: Any) -> list[Problem]:
    """Returns what is wrong with a parsed value before any model looks at it. Raises `SpecError` if it is too deep or
    large.
    """
    problems: list[Problem] = []
    for count, (path, depth, item) in enumerate(_walk(value)):
        if depth > MAX_DEPTH:
            raise SpecError(problems=[_too_deep(path)])
        if count > MAX_VALUES:
            raise SpecError(problems=[Problem("$", f"holds more than {MAX_VALUES} values")])
        if len(problems) < MAX_PROBLEMS:
            problems.extend(_flaws_of(path, item))
    return problems


def _walk(value: Any) -> Iterator[tuple[str, int, Any]]:
    """Yields every value with its path and depth, in order, without recursion."""
    waiting: list[tuple[str, int, Any]] = [("$", 0, value)]
    while waiting:
        path, depth, item = waiting.pop()
        yield path, depth, item
        if isinstance(item, dict):
            inside = [
                (path_to(path, key if isinstance(key, str) else show(key)), depth + 1, child)
                for key, child in item.items()
            ]
        elif isinstance(item, list | tuple):
            inside = [(path_to(path, index), depth + 1, child) for index, child in enumerate(item)]
        else:
            continue
        waiting.extend(reversed(inside))


def _flaws_of(path: str, item: Any) -> Iterator[Problem]:
    if isinstance(item, float) and not math.isfinite(item):
        yield Problem(path, "is not a finite number")
    elif isinstance(item, str) and (flaw := _flaw_of_text(item)):
        yield Problem(path, flaw)
    elif isinstance(item, dict):
        for key in getattr(item, "repeated", ()):
            yield Problem(path, f"the key {show(key)} is written twice", "Keep one of the two")
        for key in item:
            if flaw := _flaw_of_text(key) if isinstance(key, str) else "is not text":
                yield Problem(path, f"the key {show(key)} {flaw}")


def _flaw_of_text(text: str) -> str:
    if "\0" in text:
        return "holds a NUL character"
    if not text.isascii() and re.search("[\ud800-\udfff]", text):
        return "holds half of a surrogate pair, which is not a character"
    return ""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    plain = dict(pairs)
    if len(plain) == len(pairs):
        return plain
    repeating = _Repeating(plain)
    times = Counter(key for key, _ in pairs)
    repeating.repeated = tuple(key for key in plain if times[key] > 1)
    return repeating


def _depth(text: str) -> int:
    deepest = depth = 0
    for found in _STRING_OR_BRACKET.finditer(text):
        bracket = found[0][0]
        depth += (bracket in "[{") - (bracket in "]}")
        deepest = max(deepest, depth)
    return deepest


def _too_deep(path: str) -> Problem:
    return Problem(path[:200], f"is nested more than {MAX_DEPTH} levels deep")
