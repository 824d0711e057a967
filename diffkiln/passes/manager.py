"""Runs passes: every check first, then each pass in order, with the plan verified after each."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from diffkiln.errors import DiffkilnError, IllegalPlan, PassError, Problem
from diffkiln.passes.base import Plan
from diffkiln.passes.registry import PASSES, Placed, order_problems
from diffkiln.spec import Target


@dataclass(frozen=True)
class Ran:
    """One pass in the report: what changed, what it noted and the seconds that it took."""

    placed: Placed
    changed: bool
    notes: tuple[str, ...]
    seconds: float


def check(plan: Plan, placed: Sequence[Placed], targets: Sequence[Target], found: Sequence[Problem] = ()) -> None:
    """Every check of every pass, from configuration alone; `found` are problems that are known already.

    Raises:
        IllegalPlan: all problems together.
    """
    problems = [*found, *order_problems(placed)]
    for position, item in enumerate(placed):
        before = _plan_before(item, plan, placed[:position])
        for target in targets:
            problems += [p for p in item.step.check(before, target, item.where) if p not in problems]
    if problems:
        raise IllegalPlan(problems=problems)


def _plan_before(item: Placed, plan: Plan, earlier: Sequence[Placed]) -> Plan:
    """The plan with the facts of the passes that may stand before this one; the others are problems of their own."""
    order = list(PASSES)
    for other in earlier:
        if order.index(other.step.name) <= order.index(item.step.name):
            plan = plan.with_facts(other.step.provides())
    return plan


def run(plan: Plan, placed: Sequence[Placed], ghost: AbstractContextManager[Any]) -> tuple[Plan, list[Ran]]:
    """Run the passes on the plan's ghosts.

    Args:
        plan: checked.
        placed: the passes in order.
        ghost: entered around each pass, so that what it makes is a ghost too.

    Raises:
        PassError: a pass raised, or what it left breaks the plan's rules; names the pass and its place.
        IllegalPlan: a pass had no effect.
    """
    report: list[Ran] = []
    for item in placed:
        started = time.perf_counter()
        with guarded(item), ghost:
            outcome = item.step.run(plan)
        verify(outcome.plan, item)
        if not outcome.changed:
            mend = "Remove it, or change its options."
            raise IllegalPlan(problems=[Problem(item.where, f"{item.step.name} would have no effect", mend)])
        plan = outcome.plan
        report.append(Ran(item, outcome.changed, outcome.notes, time.perf_counter() - started))
    return plan, report


def apply(module: torch.nn.Module, component: str, placed: Sequence[Placed]) -> None:
    """Run the passes of one component on its real module.

    Raises:
        PassError: names the pass and its place.
    """
    for item in placed:
        if item.step.component == component:
            with guarded(item):
                item.step.apply(module)


@contextmanager
def guarded(item: Placed) -> Iterator[None]:
    """Whatever a pass raises becomes a PassError that names it."""
    try:
        yield
    except DiffkilnError:
        raise
    except Exception as error:
        raise PassError(f"{item.where}: {item.step.name} failed: {type(error).__name__}: {error}") from error


def verify(plan: Plan, item: Placed) -> None:
    """The rules of a plan: every weight of a ghost is a ghost, in no gradient, and no module lost its name.

    Raises:
        PassError: the pass broke one of them.
    """
    for name, module in plan.modules.items():
        for weight, tensor in module.named_parameters():
            if tensor.requires_grad:
                raise PassError(f"{item.where}: {item.step.name} left {name}.{weight} with a gradient")
            if tensor.is_meta:
                raise PassError(f"{item.where}: {item.step.name} left {name}.{weight} without a device")
