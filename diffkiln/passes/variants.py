"""Passes with several methods, each of which has an options model of its own.

A spec lists them under one name. Fields that take one value only, such as `method`, tell the models apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, get_args

from pydantic import BaseModel

from diffkiln.errors import Problem, SpecError
from diffkiln.passes.base import Pass
from diffkiln.spec import show, suggest


def constant(model: type[BaseModel], field: str) -> Any:
    """Returns the only value that a model takes for a field."""
    (value,) = get_args(model.model_fields[field].annotation)
    return value


def _fits(model: type[BaseModel], field: str, options: Mapping[str, Any]) -> bool:
    """Returns True if the options have the model's value of the field, or none where the model has it by default."""
    if field not in options:
        return not model.model_fields[field].is_required()
    given, own = options[field], constant(model, field)
    return type(given) is type(own) and given == own


class Variant(Pass):
    """One of the options models of a pass with several methods, or the pass itself, whose `variants` they are.

    Class attributes: `discriminators`, the fields that tell the models apart, in the order in which a reader looks at
    them.
    """

    discriminators: ClassVar[tuple[str, ...]]

    @classmethod
    def called(cls) -> str:
        """Returns what a user calls this model: the values that tell it apart."""
        return " of ".join(constant(cls, field) for field in reversed(cls.discriminators))

    @classmethod
    def own_fields(cls) -> list[str]:
        """Returns the fields that are the model's alone."""
        return [name for name in cls.model_fields if name not in ("component", *cls.discriminators)]

    def options(self) -> dict[str, Any]:
        """Returns the options as JSON, without those that are not given; those that tell models apart come first."""
        written = self.model_dump(mode="json", exclude_none=True)
        return {name: written[name] for name in ("component", *self.discriminators, *written)}

    @classmethod
    def no_such_field(cls, name: str) -> tuple[str, str]:
        """Returns the reason and the hint where a spec gives an option that the model does not have."""
        own = cls.own_fields()
        shown = name if name.isidentifier() else show(name)
        return f"{cls.called()} has no option {shown}", suggest(name, own) or f"It has {', '.join(own)}."

    @classmethod
    def model_for(cls, options: Mapping[str, Any] | None = None, where: str = "") -> type[Pass]:
        left = [] if options is None else list(cls.variants().values())
        for field in cls.discriminators if left else ():
            fitting = [model for model in left if _fits(model, field, options or {})]
            if not fitting:
                raise SpecError(problems=[cls.misfit(field, options or {}, left, where)])
            left = fitting
        return left[0] if left else cls

    @classmethod
    def misfit(cls, field: str, options: Mapping[str, Any], left: Sequence[type[Pass]], where: str) -> Problem:
        """Returns what is wrong with a field that tells models apart and has the value of none.

        Args:
            field: which of them.
            options: as they were given.
            left: the models that fit the earlier fields.
            where: the JSON path of the options.
        """
        path, known = f"{where}.{field}", list(dict.fromkeys(constant(model, field) for model in left))
        if field not in options:
            return Problem(path, "this field is missing", f"Add it: {left[0].model_fields[field].description}")
        value = options[field]
        if isinstance(known[0], bool) and not isinstance(value, bool):
            return Problem(path, f"must be true or false, not {show(value)}")
        if not isinstance(value, str):
            return Problem(path, f"must be text, not {show(value)}", f"There are {', '.join(known)}.")
        hint = suggest(value, known) or f"There are {', '.join(known)}."
        return Problem(path, f"there is no {field} {value!r}", hint)

    @classmethod
    def read(cls, options: Mapping[str, Any], where: str) -> Pass:
        models = cls.variants().values()
        if not models:
            return super().read(options, where)
        model = cls.model_for(options, where)
        # A null says that an option is not given, which is true of every option that another method has.
        foreign = {name for other in models for name in other.model_fields} - model.model_fields.keys()
        given = {name: value for name, value in options.items() if value is not None or name not in foreign}
        return model.read(given, where)
