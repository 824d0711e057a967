"""The section `tune` of a spec with choices: what `diffkiln tune` looks for.

Docstrings and descriptions of fields are those of the hints where a field is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, ValidationError

from diffkiln.errors import Problem, SpecError
from diffkiln.spec.choices import TUNE, Choice, Picks, choices_of, chooses, combinations, leading_to, resolved
from diffkiln.spec.json_text import flaws, read_file, read_json
from diffkiln.spec.model import Spec
from diffkiln.spec.parse import parse_spec
from diffkiln.spec.problems import problems_from, show
from diffkiln.spec.strict import Strict, in_bytes

#: What every trial measures; lower is better.
LATENCY, MEMORY, BYTES = COSTS = ("latency", "memory", "bytes")
_Positive = Annotated[float, Field(gt=0)]
_Bytes = Annotated[float, Field(gt=0), BeforeValidator(in_bytes)]
Parse = Callable[[dict[str, Any]], object]
#: Combinations that are looked at to find one in which a value makes a spec.
_LOOKS = 32


class Limits(Strict):
    """The limits of the spec that is looked for; its limits of quality are the gates of `quality`."""

    latency: _Positive | None = Field(default=None, description="Most seconds of a call, once warm.")
    memory: _Bytes | None = Field(
        default=None,
        description="Most bytes in use at once, or such as 8GiB: of the GPU's memory, or of the process without a GPU.",
    )
    bytes: _Bytes | None = Field(default=None, description="Most bytes of the bundle's files, or such as 8GiB.")


class Tune(Strict):
    """The search for the best spec."""

    objective: Annotated[str, Field(min_length=1)] = Field(
        default=LATENCY,
        description="What is to be best: `latency`, `memory`, `bytes`, or a metric of `quality`.",
    )
    limits: Limits = Field(default=Limits(), description="Limits that the spec must keep.")
    reference: Annotated[str, Field(min_length=1)] | None = Field(
        default=None,
        description="Directory, relative to the spec, of a bundle to compare pictures with. Absent: the pipeline "
        "without passes, with the inputs of each trial.",
    )


@dataclass(frozen=True)
class Tuning:
    """A spec with choices.

    Attributes:
        data: the spec as JSON, without `tune`.
        choices: in it.
        wanted: the section `tune`.
    """

    data: Mapping[str, Any]
    choices: list[Choice]
    wanted: Tune

    def plain(self, picks: Picks) -> dict[str, Any]:
        """Returns the spec that some picks make, as JSON."""
        return resolved(self.data, picks)

    @property
    def first(self) -> Spec:
        """Returns the first of its specs that is one."""
        for picks in combinations(self.data):
            if (spec := _spec_or_none(self.plain(picks))) is not None:
                return spec
        raise AssertionError("read_tuning found one")


def read_tuning(source: Path | Mapping[str, Any], parse: Parse = parse_spec) -> Tuning:
    """Returns a spec with choices, read from its file or its JSON value.

    Args:
        source: the file or the value.
        parse: raises `SpecError` for what is no spec.

    Raises:
        SpecError: it has no choices, a choice is malformed, a value that is chosen never makes a spec, or the section
            `tune` is wrong.
    """
    data = dict(source) if isinstance(source, Mapping) else _read(source)
    if problems := flaws(data):
        raise SpecError(problems=problems)
    for field in (TUNE, "quality"):
        if chooses(data.get(field)):
            raise SpecError(problems=[Problem(f"$.{field}", "says what is wanted, so it holds no choices", "Fix it")])
    rest = {key: value for key, value in data.items() if key != TUNE}
    choices = choices_of(rest)
    if not choices:
        hint = 'Write {"choose": [a, b]} in the place of a value, or use "diffkiln compile"'
        raise SpecError(problems=[Problem("$", "holds no choices, so there is nothing to tune", hint)])
    tuning = Tuning(rest, choices, _wanted(data.get(TUNE, {})))
    _check_values(tuning, parse)
    _check_objective(tuning)
    return tuning


def _read(path: Path) -> dict[str, Any]:
    text = read_file(path)
    try:
        data = read_json(text)
    except SpecError as error:
        raise SpecError(f"{path}: {error}", problems=error.problems) from None
    if not isinstance(data, dict):
        raise SpecError(problems=[Problem("$", f"must be an object, not {show(data)}")])
    return data


def _wanted(given: Any) -> Tune:
    try:
        return Tune.model_validate(given)
    except ValidationError as error:
        raise SpecError(problems=problems_from(error, Tune, f"$.{TUNE}")) from None


def _check_values(tuning: Tuning, parse: Parse) -> None:
    """Checks that each value of each choice makes a spec, with some values of the others."""
    problems: dict[str, Problem] = {}
    for choice in tuning.choices:
        for number in range(len(choice.values)):
            for problem in _never(tuning, parse, choice, number):
                problems.setdefault(str(problem), problem)
    if problems:
        raise SpecError(problems=list(problems.values()))


def _never(tuning: Tuning, parse: Parse, choice: Choice, number: int) -> tuple[Problem, ...]:
    """Returns why no combination with this value is a spec: what is wrong with the first. Empty if one is."""
    first: tuple[Problem, ...] = ()
    fixed = leading_to(tuning.choices, choice.where, number)
    for picks in islice(combinations(tuning.data, fixed), _LOOKS):
        try:
            parse(tuning.plain(picks))
        except SpecError as error:
            first = first or error.problems or (Problem(choice.where, str(error)),)
        else:
            return ()
    return first


def _spec_or_none(data: dict[str, Any]) -> Spec | None:
    try:
        return parse_spec(data)
    except SpecError:
        return None


def _check_objective(tuning: Tuning) -> None:
    metrics = [gate.metric for gate in tuning.first.quality or ()]
    name = tuning.wanted.objective
    if name not in (*COSTS, *metrics):
        known = ", ".join((*COSTS, *metrics))
        hint = f'It may be {known}. Another metric needs a gate in "quality"'
        raise SpecError(problems=[Problem(f"$.{TUNE}.objective", f"{show(name)} is not measured", hint)])
