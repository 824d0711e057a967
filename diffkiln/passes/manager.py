"""Runs passes: every check first, then each pass in order, with the plan verified after each."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from diffkiln.errors import DiffkilnError, IllegalPlan, PassError, Problem
from diffkiln.passes.base import Plan
from diffkiln.passes.registry import PASSES, Placed, order_problems
from diffkiln.record.components import weights_of
from diffkiln.spec import Target


@dataclass(frozen=True)
class Ran:
    """One pass in the report: what changed, what it noted, the seconds that it took, and the bytes that it left.

    `nbytes` are those of the weights of the pass's component.
    """

    placed: Placed
    changed: bool
    notes: tuple[str, ...]
    seconds: float
    nbytes: int


def check(plan: Plan, placed: Sequence[Placed], targets: Sequence[Target], found: Sequence[Problem] = ()) -> None:
    """Every check of every pass, from configuration alone; `found` are problems that are known already.

    The plan's modules stay as they are: what a pass will leave for later ones is tried out on an outline of a module.

    Raises:
        IllegalPlan: all problems together.
        PassError: a pass raised when it was tried out.
    """
    problems = [*found, *order_problems(placed)]
    for position, item in enumerate(placed):
        before = _plan_before(item, plan, placed[:position])
        objections = [p for target in targets for p in item.step.check(before, target, item.where)]
        problems += [p for p in dict.fromkeys(objections) if p not in problems]
        component = item.step.component
        if item.step.restructures and not objections and _stands_in(component, placed[position + 1 :]):
            plan = replace(plan, modules={**plan.modules, component: _restructured(plan.modules[component], item)})
    if problems:
        raise IllegalPlan(problems=problems)


def _stands_in(component: str, placed: Sequence[Placed]) -> bool:
    return any(item.step.component == component for item in placed)


def _restructured(module: torch.nn.Module, item: Placed) -> torch.nn.Module:
    """What a pass makes of a ghost, which stays as it is: a copy of the module tree that shares its tensors."""
    tables = [table for part in module.modules() for table in (part._parameters, part._buffers)]
    tensors = [tensor for table in tables for tensor in table.values() if tensor is not None]
    outline = copy.deepcopy(module, {id(tensor): tensor for tensor in tensors})
    fake = next((tensor.fake_mode for tensor in tensors if isinstance(tensor, FakeTensor)), nullcontext())
    with guarded(item), fake:
        item.step.apply(outline)
    return outline


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
        verify(outcome.plan, item, plan)
        if not outcome.changed:
            mend = "Remove it, or change its options."
            raise IllegalPlan(problems=[Problem(item.where, f"{item.step.name} would have no effect", mend)])
        plan = outcome.plan
        seconds = time.perf_counter() - started
        report.append(Ran(item, outcome.changed, outcome.notes, seconds, nbytes(plan.modules[item.step.component])))
    return plan, report


def apply(module: torch.nn.Module, component: str, placed: Sequence[Placed]) -> bool:
    """Run the passes of one component on its real module; gives whether there were any.

    Raises:
        PassError: names the pass and its place.
    """
    own = [item for item in placed if item.step.component == component]
    for item in own:
        with guarded(item):
            item.step.apply(module)
    return bool(own)


def nbytes(module: torch.nn.Module) -> int:
    """Size of a module's weights, ghosts or real ones, in bytes."""
    return sum(tensor.numel() * tensor.itemsize for _, tensor in weights_of(module))


@contextmanager
def guarded(item: Placed) -> Iterator[None]:
    """Whatever a pass raises becomes a PassError that names it."""
    try:
        yield
    except DiffkilnError:
        raise
    except Exception as error:
        raise PassError(f"{item.where}: {item.step.name} failed: {type(error).__name__}: {error}") from error


def verify(plan: Plan, item: Placed, before: Plan) -> None:
    """The rules of a plan: it has its components, and every weight of a ghost is a ghost, on a device, in no gradient.

    Raises:
        PassError: the pass broke one of them.
    """
    who = f"{item.where}: {item.step.name} left"
    if plan.modules.keys() != before.modules.keys():
        raise PassError(f"{who} the components {', '.join(plan.modules)} of {', '.join(before.modules)}")
    for name, module in plan.modules.items():
        for weight, tensor in module.named_parameters():
            if tensor.requires_grad:
                raise PassError(f"{who} {name}.{weight} with a gradient")
        for weight, tensor in weights_of(module):
            if tensor.is_meta:
                raise PassError(f"{who} {name}.{weight} without a device")
            if not isinstance(tensor, FakeTensor):
                raise PassError(f"{who} {name}.{weight} with data, which a ghost has not")
