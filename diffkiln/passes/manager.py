"""Runs passes on meta models: each is checked, run, and what it left is verified. Weights are read only after all
that."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from diffkiln.errors import DiffkilnError, IllegalPlan, PassError, Problem, VerifyError
from diffkiln.interpreter.portable import portable
from diffkiln.models.weights import weights_of
from diffkiln.passes.base import State
from diffkiln.passes.registry import ListedPass, order_problems
from diffkiln.program import CALL, REGION, Module, Program, verify_call_types, verify_module, verify_types
from diffkiln.program import verify as verify_program
from diffkiln.program.inference import infer_types
from diffkiln.record.pipeline import Recording
from diffkiln.spec import Target


@dataclass(frozen=True)
class Ran:
    """One pass in the report: what changed, what it noted, the seconds that it took, and the bytes that it left.

    `nbytes` are those of the weights of the pass's component.
    """

    listed: ListedPass
    changed: bool
    notes: tuple[str, ...]
    seconds: float
    nbytes: int


def run(
    state: State, listed: Sequence[ListedPass], targets: Sequence[Target] = (), found: Sequence[Problem] = ()
) -> tuple[State, list[Ran]]:
    """Checks every pass against the state that earlier ones leave, and runs it on the meta models, in place.

    An illegal pass is not run. The later ones are still checked, so that all problems are reported together.

    Args:
        state: of meta models that are given up if anything is illegal.
        listed: the passes in order.
        targets: the machines that every pass must be legal for.
        found: problems that are known already.

    Raises:
        IllegalPlan: all problems together.
        PassError: a pass raised, or what it left breaks the state's rules; names the pass and its place.
    """
    problems = [*found, *order_problems(listed)]
    out_of_order = {problem.where for problem in problems}
    report: list[Ran] = []
    for item in listed:
        # What stands in the wrong order has been told so: the facts that make it illegal say nothing new.
        known = replace(state, facts=frozenset()) if item.where in out_of_order else state
        objections = [p for target in targets for p in item.step.check(known, target, item.where)]
        problems += [p for p in dict.fromkeys(objections) if p not in problems]
        if objections or item.where in out_of_order:
            if item.step.component in state.modules:
                state = state.with_facts(item.step.provides())
            continue
        state, ran = _run_one(state, item)
        if not ran.changed:
            hint = "Remove it, or change its options."
            problems.append(Problem(item.where, f"{item.step.name} would have no effect", hint))
        report.append(ran)
    if problems:
        raise IllegalPlan(problems=problems)
    return state, report


def _run_one(state: State, item: ListedPass) -> tuple[State, Ran]:
    started = time.perf_counter()
    with guarded(item), portable():
        outcome = item.step.run(state)
    verify(outcome.state, item, state)
    seconds = time.perf_counter() - started
    module = outcome.state.modules.get(item.step.component)
    left = nbytes(module) if module is not None else 0
    return outcome.state, Ran(item, outcome.changed, outcome.notes, seconds, left)


def check_recording(recording: Recording, listed: Sequence[ListedPass], targets: Sequence[Target]) -> None:
    """Checks every pass against the recording, if there is one.

    Raises:
        IllegalPlan: all problems together.
    """
    if not recording.calls:
        return
    pairs = [(item, target) for item in listed for target in targets]
    problems = [p for item, target in pairs for p in item.step.check_recording(recording, target, item.where)]
    if problems:
        raise IllegalPlan(problems=list(dict.fromkeys(problems)))


def rewrite(recording: Recording, listed: Sequence[ListedPass]) -> tuple[Recording, list[str]]:
    """Runs the passes that rewrite programs, in order. Returns their notes.

    Raises:
        PassError: a pass raised, or left programs that break the IR's rules; names the pass and its place.
    """
    notes: list[str] = []
    for item in listed:
        if not recording.calls:
            if item.step.rewrites:
                raise PassError(
                    f"{item.where}: {item.step.name} rewrites the program, but there is none: {recording.reason}. "
                    "Remove it, or let diffusers decide at each step"
                )
            continue
        recording = _changed(recording, item, item.step.rewrite, notes)
    for item in listed if recording.calls else ():
        recording = _changed(recording, item, item.step.complete, notes)
    return recording, notes


def _changed(
    recording: Recording,
    item: ListedPass,
    change: Callable[[Recording], tuple[Recording, Sequence[str]]],
    notes: list[str],
) -> Recording:
    with guarded(item):
        changed, changes = change(recording)
    if changed is not recording:
        changed = _without_unused(changed)
        _verify_programs(changed, item)
    notes += [f"{item.step.name} of {item.step.component}: {note}" for note in changes]
    return changed


def _without_unused(recording: Recording) -> Recording:
    """Returns the recording without programs that no call uses any more, and without regions that only those used."""
    called = {
        (op.attrs["component"], op.attrs["program"])
        for programs in recording.calls
        for program in programs.values()
        for op in program.ops
        if op.name == CALL
    }
    modules = {
        name: _with_programs(module, {key: p for key, p in module.programs.items() if (name, key) in called})
        for name, module in recording.modules.items()
    }
    return replace(recording, modules=modules)


def _with_programs(module: Module, programs: Mapping[str, Program]) -> Module:
    used = {op.attrs["region"] for program in programs.values() for op in program.ops if op.name == REGION}
    regions = {name: region for name, region in module.regions.items() if name in used}
    return replace(module, programs=programs, regions=regions)


def _verify_programs(recording: Recording, item: ListedPass) -> None:
    try:
        for module in recording.modules.values():
            verify_module(module)
            for region in module.regions.values():
                infer_types(region)
            for program in module.programs.values():
                verify_types(program, module.regions)
                infer_types(program)
        for calls in recording.calls:
            for call in calls.values():
                verify_program(call, modules=recording.modules)
                verify_call_types(call, recording.modules)
                infer_types(call)
    except VerifyError as error:
        raise PassError(f"{item.where}: {item.step.name} left a program that is not well formed: {error}") from None


def apply(module: torch.nn.Module, component: str, listed: Sequence[ListedPass]) -> bool:
    """Runs the passes of one component on its real module. Returns True if there were any.

    Raises:
        PassError: names the pass and its place.
    """
    own = [item for item in listed if item.step.component == component]
    for item in own:
        with guarded(item), portable():
            item.step.apply(module)
    return bool(own)


def nbytes(module: torch.nn.Module) -> int:
    """Returns the size of a module's weights, meta models or real ones, in bytes."""
    return sum(tensor.numel() * tensor.itemsize for _, tensor in weights_of(module))


@contextmanager
def guarded(item: ListedPass) -> Iterator[None]:
    """Turns any error of a pass into a PassError that names the pass."""
    try:
        yield
    except DiffkilnError:
        raise
    except Exception as error:
        # By `rewrite` a pass says so what the programs do not allow; of any other exception the class is told, too.
        reason = f"{error}" if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise PassError(f"{item.where}: {item.step.name} failed: {reason}") from error


def verify(state: State, item: ListedPass, before: State) -> None:
    """Checks the rules of a state: it has its components, and every weight of a meta model is without data and
    gradient.

    Raises:
        PassError: the pass broke one of them.
    """
    who = f"{item.where}: {item.step.name} left"
    if state.modules.keys() != before.modules.keys():
        raise PassError(f"{who} the components {', '.join(state.modules)} of {', '.join(before.modules)}")
    for name, module in state.modules.items():
        for weight, tensor in _own_tensors(module):
            if tensor.requires_grad:
                raise PassError(f"{who} {name}.{weight} with a gradient")
            if not tensor.is_meta:
                raise PassError(f"{who} {name}.{weight} with data, and a meta model has none")


def _own_tensors(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and persistent buffers, quantized ones as they are: `weights_of` without looking for ties."""
    for path, part in module.named_modules():
        passing = part._non_persistent_buffers_set
        for table in (part._parameters, part._buffers):
            for leaf, tensor in table.items():
                if tensor is not None and leaf not in passing:
                    yield f"{path}.{leaf}".removeprefix("."), tensor
