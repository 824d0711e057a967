"""What a spec leaves to the memory, such as tiles of the decoder: the first way in which all calls fit is taken."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from diffkiln.compiler.plan import Plan
from diffkiln.compiler.planning import check_memory, is_bounded, working_of
from diffkiln.errors import IllegalPlan, Problem, SpecError
from diffkiln.passes.registry import pass_classes
from diffkiln.spec import PassEntry, Spec

_UNBOUNDED = "nothing says how much memory a call may take"
_BOUND = 'Give "max_memory" in "offload" of "runtime", or a GPU as the target, or decide it yourself.'

#: Returns the plan of a spec, its programs as the passes leave them.
PlanOf = Callable[[Spec], Plan]


def fitted(spec: Spec, plan_of: PlanOf) -> tuple[Spec, tuple[str, ...]]:
    """Returns the spec with nothing left to the memory, and a notice of each entry that was.

    Args:
        spec: with any passes.
        plan_of: checks and records a spec; no weight is read.

    Raises:
        IllegalPlan: no way fits, or nothing bounds the memory.
        SpecError: as `plan_of`.
    """
    notices = []
    for index, ways in _open(spec):
        spec, notice = _fitted(spec, index, ways, plan_of)
        notices.append(notice)
    return spec, tuple(notices)


def open_to_memory(plan: Plan) -> Iterator[str]:
    """Yields what a user should know of entries that the memory has not decided yet.

    Raises:
        IllegalPlan: nothing bounds the memory.
    """
    for index, ways in _open(plan.spec):
        _require_bound(plan, index)
        first, second, *_ = ways
        yield f"$.passes[{index}]: compile plans the memory. {first} if all calls fit so, else {second} and so on"


def _open(spec: Spec) -> Iterator[tuple[int, Mapping[str, PassEntry]]]:
    classes = pass_classes()
    for index, entry in enumerate(spec.passes):
        ways: Mapping[str, Mapping[str, Any]] = {}
        if entry.name in classes:
            ways = classes[entry.name].within_memory(entry.options)
        if ways:
            yield index, {name: PassEntry.model_validate({"name": entry.name, **way}) for name, way in ways.items()}


def _fitted(spec: Spec, index: int, ways: Mapping[str, PassEntry], plan_of: PlanOf) -> tuple[Spec, str]:
    where = f"$.passes[{index}]"
    problems: tuple[Problem, ...] = ()
    for name, entry in ways.items():
        found = spec.model_copy(update={"passes": (*spec.passes[:index], entry, *spec.passes[index + 1 :])})
        try:
            plan = plan_of(found)
        except (IllegalPlan, SpecError):
            if not problems:  # the first way is the spec as it stands
                raise
            continue
        _require_bound(plan, index)
        try:
            check_memory(plan, working_of(plan))
        except IllegalPlan as error:
            problems = error.problems
            continue
        return found, f"{where}: {name}, the first of {len(ways)} ways that fits the memory"
    raise IllegalPlan(problems=problems)


def _require_bound(plan: Plan, index: int) -> None:
    if not is_bounded(plan):
        raise IllegalPlan(problems=[Problem(f"$.passes[{index}]", _UNBOUNDED, _BOUND)])
