"""The installed passes by name, and those that a spec lists."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diffkiln import plugins
from diffkiln.errors import Problem, SpecError
from diffkiln.passes.base import Pass, State
from diffkiln.passes.order import ORDER
from diffkiln.spec import PassEntry, Spec, suggest

#: The index of a pass that stands not in the list: the spec's runtime asks for it.
IMPLIED = -1


@dataclass(frozen=True)
class ListedPass:
    """A pass with its place in the spec; `key` is the component where the entry is a mapping of components."""

    index: int
    step: Pass
    key: str = ""

    @property
    def where(self) -> str:
        if self.index == IMPLIED:
            return self.step.asked_at
        return f"$.passes[{self.index}]" + (f".mapping.{self.key}" if self.key else "")


def option_models() -> dict[str, type[Pass]]:
    """Returns the options of every installed pass by its name, for the schema and the help, in their order."""
    return {name: cls.model_for() for name, cls in pass_classes().items()}


@functools.cache
def pass_classes() -> Mapping[str, type[Pass]]:
    """Returns every installed pass by name, in the order in which a spec must list those of one component.

    Raises:
        SpecError: two packages bring passes of one name, or one that cannot stand where it says.
    """
    classes: dict[str, type[Pass]] = {name: plugin.load() for name, plugin in plugins.plugins("passes").items()}
    order = list(ORDER)
    for name in classes.keys() - set(ORDER):
        order.insert(_index(classes[name], order), name)
    return {name: classes[name] for name in order}


def _index(cls: type[Pass], order: Sequence[str]) -> int:
    """Returns where a pass of another distribution stands: after all that it names, and else just before the
    engines."""
    first = max((order.index(name) + 1 for name in cls.after if name in order), default=0)
    last = min((order.index(name) for name in cls.before if name in order), default=len(order) - 1)
    if first > last:
        raise SpecError(f"the pass {cls.name} wants to stand after {order[first - 1]} and before {order[last]}")
    return last


def with_implied(listed: Sequence[ListedPass], spec: Spec, state: State) -> tuple[ListedPass, ...]:
    """Returns the passes with those that the spec asks for elsewhere, each where it may stand."""
    order, found = list(pass_classes()), list(listed)
    for cls in pass_classes().values():
        for step in cls.implied(spec, state):
            own = [(at, item.step) for at, item in enumerate(found) if item.step.component == step.component]
            if not any(other.name == step.name for _, other in own):
                after = [at for at, other in own if order.index(other.name) > order.index(step.name)]
                found.insert(after[0] if after else len(found), ListedPass(IMPLIED, step))
    return tuple(found)


def pass_class(name: str) -> type[Pass]:
    """Returns the class of an existing pass."""
    return pass_classes()[name]


def reason(first: type[Pass], second: type[Pass]) -> str:
    """Returns why one pass comes before another, where either says so; else "", for there is none but the order
    itself."""
    return (
        first.before.get(second.name)
        or second.after.get(first.name)
        or first.before.get("*")
        or second.after.get("*")
        or ""
    )


def read_passes(entries: Sequence[PassEntry]) -> list[ListedPass]:
    """Returns the passes of a spec with checked options; a mapping of components gives one pass for each.

    Raises:
        SpecError: unknown passes and wrong options, all together.
    """
    known = pass_classes()
    listed: list[ListedPass] = []
    problems: list[Problem] = []
    for index, entry in enumerate(entries):
        where = f"$.passes[{index}]"
        if entry.name not in known:
            hint = suggest(entry.name, known) or f"There are {', '.join(known)}."
            problems.append(Problem(f"{where}.name", f"there is no pass {entry.name!r}", hint))
            continue
        cls = known[entry.name]
        try:
            spread = _spread(cls, entry.options, where)
        except SpecError as error:
            problems += error.problems
            continue
        for key, options in spread.items():
            at = f"{where}.mapping.{key}" if key else where
            try:
                listed.append(ListedPass(index, cls.read(options, at), key))
            except SpecError as error:
                problems += error.problems
    if problems:
        raise SpecError(problems=problems)
    return listed


def _spread(cls: type[Pass], options: dict[str, Any], where: str) -> dict[str, dict[str, Any]]:
    """Returns the options of each component of a mapping, with common options as defaults; without a mapping, under "".

    Raises:
        SpecError: the mapping is none of components.
    """
    if "mapping" not in options or not cls.maps:
        return {"": options}
    common = {key: value for key, value in options.items() if key != "mapping"}
    mapping = options["mapping"]
    if "component" in common:
        problem = Problem(f"{where}.component", "names one component beside a mapping of several", "Remove it.")
        raise SpecError(problems=[problem])
    if not isinstance(mapping, dict) or not mapping or not all(isinstance(row, dict) for row in mapping.values()):
        example = next(json.dumps(entry["mapping"]) for entry in cls.examples if "mapping" in entry)
        raise SpecError(
            problems=[Problem(f"{where}.mapping", f"must give options for each component, such as {example}")]
        )
    reason = "names a component again, which is the key of the mapping already"
    twice = [component for component, row in mapping.items() if "component" in row]
    if twice:
        raise SpecError(problems=[Problem(f"{where}.mapping.{name}.component", reason, "Remove it.") for name in twice])
    return {component: {**common, **row, "component": component} for component, row in mapping.items()}


def _of_the_run(first: Pass, second: Pass) -> bool:
    """Returns True if one of them stands before the other whatever the component."""
    return second.name in first.before_all or first.name in second.before_all


def order_problems(listed: Sequence[ListedPass]) -> list[Problem]:
    """Passes of one component that stand in the wrong order, or twice."""
    order = list(pass_classes())
    problems: list[Problem] = []
    for later, item in enumerate(listed):
        for before in listed[:later]:
            if before.step.component != item.step.component and not _of_the_run(before.step, item.step):
                continue
            first, second = before.step.name, item.step.name
            if first == second and not item.step.repeats:
                problems.append(
                    Problem(item.where, f"{second} of {item.step.component} stands twice, also at {before.where}")
                )
            elif order.index(first) > order.index(second):
                why = reason(type(item.step), type(before.step)) or "that is the canonical order"
                problems.append(
                    Problem(
                        item.where,
                        f"{second} must come before {first} ({before.where}): {why}",
                        f"Move it before {before.where}.",
                    )
                )
    return problems
