"""From a file, JSON text or a dict to a checked `Spec`. Whatever is wrong with it comes out as one `SpecError`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from diffkiln.errors import Problem, SpecError
from diffkiln.guards.gate import gated
from diffkiln.spec.choices import TUNE, chooses
from diffkiln.spec.json_text import flaws, read_file, read_json
from diffkiln.spec.migrate import migrate
from diffkiln.spec.model import Spec
from diffkiln.spec.problems import problems_from, show
from diffkiln.spec.targets import resolve_targets, unknown_gpus


@gated()
def parse_spec(source: Path | str | bytes | dict[str, Any] | Spec) -> Spec:
    """Returns the spec in a file (`Path` or `str`), in JSON text (`bytes`), or in a JSON value (`dict`).

    Every target of the result resolves. Raises `SpecError` with all problems at once, each with its JSON path.
    """
    spec = source if isinstance(source, Spec) else _validate(_read(source))
    resolve_targets(spec)
    return spec


def _read(source: Path | str | bytes | dict[str, Any]) -> Any:
    if isinstance(source, dict):
        return source
    if isinstance(source, bytes):
        return read_json(source)
    data = read_file(Path(source))
    try:
        return read_json(data)
    except SpecError as error:
        raise SpecError(f"{source}: {error}", problems=error.problems) from None


def _validate(data: Any) -> Spec:
    problems = flaws(data)
    if not isinstance(data, dict):
        raise SpecError(problems=[Problem("$", f"must be an object, not {show(data)}")])
    if not problems and (TUNE in data or chooses(data)):
        hint = 'Find the best with "diffkiln tune", which writes a plain spec'
        raise SpecError(problems=[Problem("$", "is a spec with choices, which stands for many", hint)])
    data = migrate(data)
    try:
        spec = Spec.model_validate(data)
    except ValidationError as error:
        flawed = {problem.where for problem in problems}
        problems += [problem for problem in problems_from(error, Spec) if problem.where not in flawed]
        problems += unknown_gpus(data.get("target"))
        raise SpecError(problems=problems) from None
    if problems:
        raise SpecError(problems=problems)
    return spec
