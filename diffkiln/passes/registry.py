"""Passes by name, in the canonical order. A pass's module is imported when it is asked for.

To add a pass: write `diffkiln/passes/<verb>.py` with one subclass of `Pass`, add its line here at its place in the
order, and write `tests/passes/test_<verb>.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module

from pydantic import ValidationError

from diffkiln.errors import Problem, SpecError
from diffkiln.passes.base import Pass
from diffkiln.spec import PassEntry, problems_from, suggest

#: name → "module:Class". The order is the order in which a spec must list them.
PASSES: dict[str, str] = {
    "cast": "diffkiln.passes.cast:Cast",
    "fuse_qkv": "diffkiln.passes.fuse_qkv:FuseQKV",
    "quantize": "diffkiln.passes.quantize:Quantize",
    "compile": "diffkiln.passes.compile:Compile",
}

#: Why one comes before the other, where a person may ask.
REASONS: dict[tuple[str, str], str] = {
    ("cast", "fuse_qkv"): "a fused projection would be cast again",
    ("cast", "quantize"): "quantized weights have the type that quantization gave them",
    ("fuse_qkv", "quantize"): "quantized projections cannot be concatenated",
    ("fuse_qkv", "compile"): "engines are built from what the other passes leave",
    ("quantize", "compile"): "engines are built from what the other passes leave",
    ("cast", "compile"): "engines are built from what the other passes leave",
}


@dataclass(frozen=True)
class Placed:
    """A pass with its place in the spec."""

    index: int
    step: Pass

    @property
    def where(self) -> str:
        return f"$.passes[{self.index}]"


def pass_class(name: str) -> type[Pass]:
    """The class of a pass that exists."""
    module, _, attribute = PASSES[name].partition(":")
    return getattr(import_module(module), attribute)


def option_models() -> dict[str, type[Pass]]:
    """Every pass by name, for the schema and the help."""
    return {name: pass_class(name) for name in PASSES}


def read_passes(entries: Sequence[PassEntry]) -> list[Placed]:
    """The passes that a spec lists, with their options checked.

    Raises:
        SpecError: unknown passes and wrong options, all together.
    """
    placed: list[Placed] = []
    problems: list[Problem] = []
    for index, entry in enumerate(entries):
        where = f"$.passes[{index}]"
        if entry.name not in PASSES:
            mend = suggest(entry.name, PASSES) or f"There are {', '.join(PASSES)}."
            problems.append(Problem(f"{where}.name", f"there is no pass {entry.name!r}", mend))
            continue
        cls = pass_class(entry.name)
        try:
            placed.append(Placed(index, cls.model_validate(entry.options)))
        except ValidationError as error:
            problems += problems_from(error, cls, where)
    if problems:
        raise SpecError(problems=problems)
    return placed


def order_problems(placed: Sequence[Placed]) -> list[Problem]:
    """Passes of one component that stand in the wrong order, or twice."""
    order = list(PASSES)
    problems: list[Problem] = []
    for later, item in enumerate(placed):
        for before in placed[:later]:
            if before.step.component != item.step.component:
                continue
            first, second = before.step.name, item.step.name
            if first == second and first != "cast":
                problems.append(
                    Problem(item.where, f"{second} of {item.step.component} stands twice, also at {before.where}")
                )
            elif order.index(first) > order.index(second):
                reason = REASONS.get((second, first), "that is the canonical order")
                problems.append(
                    Problem(
                        item.where,
                        f"{second} must come before {first} ({before.where}): {reason}",
                        f"Move it before {before.where}.",
                    )
                )
    return problems
