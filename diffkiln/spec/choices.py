"""Choices in a spec: a list of values, or a range of numbers, in the place of any value. `diffkiln tune` tries them.

    {"choose": ["fora", "dbcache"]}                     one of these
    {"choose": {"from": 1, "to": 8}}                    a whole number
    {"choose": {"from": 0.1, "to": 0.5, "step": 0.1}}   a number

A value may hold choices itself; those count only where it is chosen. In a list, null leaves the item out, and a list
stands for several items.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from math import prod
from typing import Any

from diffkiln.errors import Problem, SpecError
from diffkiln.spec.problems import path_to, show

CHOOSE = "choose"
#: The section of a spec with choices that says which is the best.
TUNE = "tune"
#: A range with more numbers is a slip of the finger.
MOST = 1000

#: The place of each choice that counts, as a JSON path, and the number of the value that is chosen there.
Picks = Mapping[str, int]


@dataclass(frozen=True)
class Choice:
    """A choice of a spec.

    Attributes:
        where: its JSON path.
        values: what it may be.
        ordered: whether they are numbers of a range.
    """

    where: str
    values: tuple[Any, ...]
    ordered: bool


def is_choice(value: Any) -> bool:
    """Returns True if a JSON value is a choice."""
    return isinstance(value, dict) and CHOOSE in value


def choices_of(data: Any) -> list[Choice]:
    """Returns the choices of a spec, each before those in its values.

    Raises:
        SpecError: some are malformed; all that is wrong.
    """
    found = list(_found(data, "$"))
    if problems := [item for item in found if isinstance(item, Problem)]:
        raise SpecError(problems=problems)
    return [item for item in found if isinstance(item, Choice)]


def count(data: Any) -> int:
    """Returns how many specs the choices stand for."""
    if is_choice(data):
        return sum(count(value) for value in _values(data))
    return prod(count(value) for _, value in _parts(data, "$"))


def combinations(data: Any, fixed: Picks | None = None, where: str = "$") -> Iterator[dict[str, int]]:
    """Yields the picks of every spec that the choices stand for, the last choice fastest.

    Args:
        data: the spec.
        fixed: choices that have one value only.
        where: its JSON path.
    """
    fixed = fixed or {}
    if not is_choice(data):
        yield from _product([item for item in _parts(data, where) if chooses(item[1])], fixed)
        return
    for number, value in enumerate(_values(data)):
        if fixed.get(where, number) == number:
            for inner in combinations(value, fixed, _inside(where, number)):
                yield {where: number, **inner}


def leading_to(choices: Sequence[Choice], where: str, number: int) -> Picks:
    """Returns a pick with those of the choices around it, without which it does not count."""
    found = {where: number}
    for choice in choices:
        for outer in range(len(choice.values)):
            if where.startswith(_inside(choice.where, outer)):
                found[choice.where] = outer
    return found


def active(data: Any, picks: Picks, where: str = "$") -> dict[str, int]:
    """Returns the picks without those in values that are not chosen."""
    if is_choice(data):
        number = picks[where]
        return {where: number, **active(_values(data)[number], picks, _inside(where, number))}
    found: dict[str, int] = {}
    for path, value in _parts(data, where):
        found |= active(value, picks, path)
    return found


def resolved(data: Any, picks: Picks, where: str = "$") -> Any:
    """Returns the plain JSON value that some picks make of one with choices."""
    if is_choice(data):
        number = picks[where]
        return resolved(_values(data)[number], picks, _inside(where, number))
    if isinstance(data, dict):
        return {key: resolved(value, picks, path_to(where, key)) for key, value in data.items()}
    if isinstance(data, list):
        return list(_items(data, picks, where))
    return data


def in_words(choices: Sequence[Choice], picks: Picks) -> str:
    """Returns picks in words, such as "passes[1].interval: 2, passes[2]: null"."""
    chosen = [(item.where, item.values[picks[item.where]]) for item in choices if item.where in picks]
    return ", ".join(f"{where.removeprefix('$.')}: {_brief(value)}" for where, value in chosen)


def chooses(data: Any) -> bool:
    """Returns True if there is a choice in a JSON value."""
    return is_choice(data) or any(chooses(value) for _, value in _parts(data, "$"))


def _brief(value: Any) -> str:
    """Returns a value as JSON: of a pass without its component, and of one that holds choices only what is fixed."""
    if isinstance(value, dict):
        return show({key: item for key, item in value.items() if key != "component" and not chooses(item)})
    return show(value)


def _found(data: Any, where: str) -> Iterator[Choice | Problem]:
    if not is_choice(data):
        for path, value in _parts(data, where):
            yield from _found(value, path)
    elif problem := _problem(data, where):
        yield problem
    else:
        values = _values(data)
        yield Choice(where, values, isinstance(data[CHOOSE], dict))
        for number, value in enumerate(values):
            yield from _found(value, _inside(where, number))


def _parts(data: Any, where: str) -> Iterator[tuple[str, Any]]:
    """Yields what an object or a list holds, each with its path."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        yield path_to(where, key), value


def _inside(where: str, number: int) -> str:
    return f"{where}.{CHOOSE}[{number}]"


def _items(data: list[Any], picks: Picks, where: str) -> Iterator[Any]:
    for number, item in enumerate(data):
        path = path_to(where, number)
        made = resolved(item, picks, path)
        if not is_choice(item):
            yield made
        elif isinstance(made, list):
            yield from made
        elif made is not None:
            yield made


def _product(parts: Sequence[tuple[str, Any]], fixed: Picks) -> Iterator[dict[str, int]]:
    if not parts:
        yield {}
        return
    (where, value), *rest = parts
    for first in combinations(value, fixed, where):
        for others in _product(rest, fixed):
            yield {**first, **others}


# -- one choice --


def _values(choice: Mapping[str, Any]) -> tuple[Any, ...]:
    given = choice[CHOOSE]
    return tuple(given) if isinstance(given, list) else tuple(_numbers(given))


def _numbers(given: Mapping[str, Any]) -> Iterator[int | float]:
    """Yields the numbers of a range, the last one included. Decimals keep 0.1 + 0.2 at 0.3."""
    first, last, step = (Decimal(str(given.get(name, 1))) for name in ("from", "to", "step"))
    whole = all(isinstance(value, int) for value in given.values())
    for number in range(int((last - first) / step) + 1):
        yield int(first + number * step) if whole else float(first + number * step)


def _problem(choice: Mapping[str, Any], where: str) -> Problem | None:
    given = choice[CHOOSE]
    if others := sorted(choice.keys() - {CHOOSE}):
        return Problem(path_to(where, others[0]), "stands beside a choice, which has no other field", "Remove it")
    if isinstance(given, dict):
        return _range_problem(given, f"{where}.{CHOOSE}")
    if not isinstance(given, list):
        return Problem(f"{where}.{CHOOSE}", f"must be a list or a range, not {show(given)}", "Write a list of values")
    if len(given) < 2:
        reason = "is a choice of one value, so there is nothing to choose" if given else "is a choice of nothing"
        return Problem(where, reason, "Give two values or more, or write the value itself")
    for number, value in enumerate(given):
        if any(_exactly(value) == _exactly(other) for other in given[:number]):
            return Problem(_inside(where, number), f"{show(value)} is there already", "Remove one of the two")
    return None


def _exactly(value: Any) -> tuple[str, str]:
    """Returns what tells JSON values apart: true and 1 are two."""
    return type(value).__name__, repr(value)


def _range_problem(given: Mapping[str, Any], where: str) -> Problem | None:
    known = ("from", "to", "step")
    if others := [name for name in given if name not in known]:
        return Problem(path_to(where, others[0]), "there is no such field", 'A range has "from", "to" and "step"')
    if missing := [name for name in known[:2] if name not in given]:
        return Problem(f"{where}.{missing[0]}", "this field is missing", 'A range has "from", "to" and "step"')
    for name, value in given.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or value != value or abs(value) > 1e15:
            return Problem(f"{where}.{name}", f"must be a number, not {show(value)}")
    if "step" not in given and not all(isinstance(value, int) for value in given.values()):
        return Problem(f"{where}.step", "this field is missing", "A range of numbers that are not whole needs it")
    first, last, step = given["from"], given["to"], given.get("step", 1)
    if step <= 0:
        return Problem(f"{where}.step", f"must be greater than 0, not {show(step)}")
    if first + step > last:
        return Problem(where, "is a choice of one value, so there is nothing to choose", 'Set "to" higher')
    if (last - first) / step > MOST:
        return Problem(where, f"is a choice of more than {MOST} values", 'Give a larger "step"')
    return None
