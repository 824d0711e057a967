"""From pydantic's validation errors to `Problem`s: a JSON path, a reason in plain words, and a hint.

Used for the spec and, with a prefix such as `$.passes[1]`, for the options of a single pass.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from types import UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic import BaseModel, Tag, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

from diffkiln.errors import Problem
from diffkiln.guards.spelling import suggest

MAX_PROBLEMS = 50
"""A report longer than this helps nobody, and a hostile file could ask for millions of lines."""

_MAX_SHOWN = 60
_REFUSED = "refused"

# Sentences for the error types of pydantic-core that a declared model can give. `{…}` comes from the error's context.
_REASONS = {
    "string_type": "must be text",
    "string_unicode": "must be text that UTF-8 can hold",
    "string_too_short": "must have at least {min_length} characters",
    "string_too_long": "must have at most {max_length} characters",
    "string_pattern_mismatch": "must match the pattern {pattern}",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "int_parsing_size": "must be a smaller number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "none_required": "must be null",
    "dict_type": "must be an object",
    "model_type": "must be an object",
    "model_attributes_type": "must be an object",
    "tuple_type": "must be a list",
    "list_type": "must be a list",
    "set_type": "must be a list",
    "frozen_set_type": "must be a list",
    "too_short": "must have at least {min_length} items",
    "too_long": "must have at most {max_length} items",
    "greater_than": "must be greater than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "multiple_of": "must be a multiple of {multiple_of}",
}


class _Location(NamedTuple):
    """The place of an error: its path in the JSON, the model of the path's last part, and whether a union was met."""

    path: list[str | int]
    owner: type[BaseModel] | None
    in_union: bool


def refuse(reason: str, hint: str = "") -> PydanticCustomError:
    """Returns the error to raise in a validator when the problem has a hint of its own."""
    return PydanticCustomError(_REFUSED, "{reason}", {"reason": reason, "mend": hint})


def path_to(prefix: str, *segments: str | int) -> str:
    """Returns a JSON path: `path_to("$", "passes", 1, "type")` is `$.passes[1].type`."""
    path = prefix
    for segment in segments:
        if isinstance(segment, int):
            path += f"[{segment}]"
        elif re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,59}", segment):
            path += f".{segment}"
        else:
            path += f"[{show(segment)}]"
    return path


def show(value: Any) -> str:
    """Returns a value as JSON, short enough for one line."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):  # not JSON, more digits than Python prints, or too deep
        return f"a value of type {type(value).__name__}"
    text = text.encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}…"


def problems_from(error: ValidationError, model: type[BaseModel], prefix: str = "$") -> list[Problem]:
    """Returns the problems in `error`, which validating `model` raised; at most `MAX_PROBLEMS`."""
    problems: list[Problem] = []
    details = error.errors(include_url=False)
    for detail in details[:MAX_PROBLEMS]:
        location = _locate(model, detail["loc"])
        problem = _problem(detail, location, prefix)
        if location.in_union and problems and problems[-1].where == problem.where:  # one sentence for each member
            problem = Problem(problem.where, f"{problems.pop().reason}; or {problem.reason}", problem.hint)
        problems.append(problem)
    if len(details) > MAX_PROBLEMS:
        problems.append(Problem(prefix, f"{len(details) - MAX_PROBLEMS} more problems are not listed"))
    return problems


def _problem(detail: ErrorDetails, location: _Location, prefix: str) -> Problem:
    kind, context, value = detail["type"], detail.get("ctx", {}), detail["input"]
    where = path_to(prefix, *location.path)
    if kind == _REFUSED:
        return Problem(where, context["reason"], context["mend"])
    if kind in ("value_error", "assertion_error"):
        return Problem(where, str(context["error"]))
    if kind == "missing":
        return Problem(where, "this field is missing", _describe(location.owner, str(location.path[-1])))
    if kind == "extra_forbidden":
        return Problem(where, *_no_such_field(location.owner, str(location.path[-1])))
    if kind in ("literal_error", "enum"):
        return _not_a_choice(where, value, context["expected"])
    if kind == "union_tag_invalid":
        where = path_to(where, context["discriminator"].strip("'"))
        return _not_a_choice(where, context["tag"], context["expected_tags"])
    if kind in _REASONS:
        return Problem(where, f"{_REASONS[kind].format_map(context)}, not {show(value)}")
    message = detail["msg"]
    return Problem(where, message[:1].lower() + message[1:])


def _not_a_choice(where: str, value: Any, expected: str) -> Problem:
    choices = re.findall(r"'([^']*)'", expected)
    listed = ", ".join(f'"{choice}"' for choice in choices) or expected
    reason = f"{show(value)} is not one of {listed}" if len(choices) > 1 else f"must be {listed}, not {show(value)}"
    return Problem(where, reason, suggest(value, choices) if isinstance(value, str) else "")


def _describe(owner: type[BaseModel] | None, name: str) -> str:
    field = _fields(owner).get(name)
    description = (field.description or "") if field else ""
    return f"Add it: {' '.join(description.split())}" if description else "Add it"


def _no_such_field(owner: type[BaseModel] | None, name: str) -> tuple[str, str]:
    """Returns the reason and the hint; a model may have words of its own for it."""
    words = getattr(owner, "no_such_field", None)
    if words and (said := words(name)):
        return said
    return "there is no such field", _hint_field(owner, name)


def _hint_field(owner: type[BaseModel] | None, name: str) -> str:
    if hint := suggest(name, _fields(owner)):
        return hint
    if hint := getattr(owner, "unknown_field_hint", ""):
        return hint
    return f"The fields are: {', '.join(_fields(owner))}" if owner else ""


def _fields(owner: type[BaseModel] | None) -> Mapping[str, Any]:
    """Returns the fields by the name that JSON uses."""
    return {field.alias or name: field for name, field in owner.model_fields.items()} if owner else {}


def _locate(model: type[BaseModel], loc: tuple[str | int, ...]) -> _Location:
    """Walks the annotations along `loc`, which holds the labels of union members beside the keys of the JSON."""
    path: list[str | int] = []
    annotation: Any = model
    owner: type[BaseModel] | None = None
    in_union = False
    for segment in loc:
        members = _members(annotation)
        in_model = any(isinstance(_bare(m), type) and issubclass(_bare(m), BaseModel) for m in members)
        if segment == "[key]" and not in_model:  # pydantic's mark for a problem of a mapping's key, not of its value
            continue
        if len(members) > 1:
            annotation = next((member for member in members if str(segment) in _labels(member)), Any)
            in_union |= not any(isinstance(mark, Tag) for mark in getattr(annotation, "__metadata__", ()))
            continue
        bare = _bare(members[0])
        owner = bare if isinstance(bare, type) and issubclass(bare, BaseModel) else None
        path.append(segment)
        annotation = _inside(bare, segment)
    return _Location(path, owner, in_union)


def _bare(annotation: Any) -> Any:
    while get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    return annotation


def _members(annotation: Any) -> list[Any]:
    """Returns the members of a union except None, which has no label in `loc`; for anything else, itself."""
    bare = _bare(annotation)
    if get_origin(bare) not in (Union, UnionType):
        return [annotation]
    members = [member for member in get_args(bare) if member is not type(None)]
    return _members(members[0]) if len(members) == 1 else members


def _labels(member: Any) -> set[str]:
    """Returns the words by which pydantic may name this member of a union in `loc`."""
    labels = {mark.tag for mark in getattr(member, "__metadata__", ()) if isinstance(mark, Tag)}
    bare = _bare(member)
    if isinstance(bare, type) and issubclass(bare, BaseModel):
        labels.add(bare.__name__)
        for field in bare.model_fields.values():
            if get_origin(field.annotation) is Literal:
                labels.update(str(value) for value in get_args(field.annotation))
    return labels


def _inside(annotation: Any, segment: str | int) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        field = _fields(annotation).get(str(segment))
        return field.annotation if field else Any
    arguments = [argument for argument in get_args(annotation) if argument is not Ellipsis]
    return arguments[-1] if arguments else Any
