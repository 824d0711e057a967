"""What a spec leaves to measurement, such as a backend: the ways that are legal are built and timed on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from diffkiln.bundle import open_bundle
from diffkiln.bundle.scratch import Scratch
from diffkiln.compiler.plan import Plan
from diffkiln.compiler.stages import Stages
from diffkiln.compiler.verify.cases import Lengths, cases_of
from diffkiln.errors import BuildError, IllegalPlan, Incompatible, Problem, SpecError
from diffkiln.exporters.here import why_not_here
from diffkiln.interpreter.quiet import quiet_libraries
from diffkiln.passes.registry import pass_classes
from diffkiln.runtime.accelerator import wait
from diffkiln.runtime.loading import LoadOptions, load_verified
from diffkiln.runtime.pipeline import CompiledPipeline, text_end
from diffkiln.spec import PassEntry, Spec, resolve_targets

#: Calls of each variant that count, after one that does not.
RUNS = 3
_HINT = "Name one way, or compile for one machine, on it, in one process."


@dataclass(frozen=True)
class Choice:
    """An entry of a spec's passes that may be one of several others, by name."""

    index: int
    component: str
    ways: Mapping[str, PassEntry]

    @property
    def where(self) -> str:
        return f"$.passes[{self.index}]"


def settled(spec: Spec, choices: Sequence[Choice], wanted: str = "") -> Spec:
    """Returns the spec with one way of each choice: the one of this name, or the first where it has none of it."""
    passes = list(spec.passes)
    for each in choices:
        passes[each.index] = each.ways[wanted if wanted in each.ways else next(iter(each.ways))]
    return spec.model_copy(update={"passes": tuple(passes)})


def choices_of(spec: Spec, check: Callable[[Spec], object]) -> tuple[Choice, ...]:
    """Returns what a spec leaves to measurement, each with the ways that are legal.

    Args:
        spec: with any passes.
        check: raises `IllegalPlan` or `SpecError` for a spec that is not legal.

    Raises:
        IllegalPlan: no way of a choice is legal; says why of each.
    """
    every = tuple(_every(spec))
    return tuple(_legal(spec, each, every, check) for each in every)


def open_to_measurement(choices: Sequence[Choice]) -> Iterator[str]:
    """Yields what a user should know of choices that nothing has measured yet."""
    for each in choices:
        ways = ", ".join(each.ways)
        yield f"{each.where}: {ways} fit {each.component}; compile builds the bundle with each, and takes the fastest"


def _every(spec: Spec) -> Iterator[Choice]:
    classes = pass_classes()
    for index, entry in enumerate(spec.passes):
        if ways := classes[entry.name].ways(entry.options) if entry.name in classes else {}:
            entries = {name: PassEntry.model_validate({"name": entry.name, **way}) for name, way in ways.items()}
            yield Choice(index, str(entry.component), entries)


def _legal(spec: Spec, choice: Choice, every: Sequence[Choice], check: Callable[[Spec], object]) -> Choice:
    """Returns a choice with its legal ways, each looked at without the entries that are open as well."""
    others = {each.index for each in every} - {choice.index}
    fits: dict[str, PassEntry] = {}
    problems: list[Problem] = []
    for name, entry in choice.ways.items():
        passes = [entry if at == choice.index else old for at, old in enumerate(spec.passes) if at not in others]
        try:
            check(spec.model_copy(update={"passes": tuple(passes)}))
        except (IllegalPlan, SpecError) as error:
            problems += [Problem(choice.where, f"{name}: {each.reason}", each.hint) for each in error.problems]
        else:
            fits[name] = entry
    if not fits:
        raise IllegalPlan(problems=problems)
    return Choice(choice.index, choice.component, fits)


# -- measuring --


class Measured:
    """The seconds of each component in a call, by the ways that were built."""

    def __init__(self, choices: Sequence[Choice]) -> None:
        self._choices = choices
        self._seconds: dict[tuple[str, str], float] = {}
        self._failed: dict[str, str] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """Returns the ways to build; none where every choice has one alone."""
        wide = [each for each in self._choices if len(each.ways) > 1]
        return tuple(dict.fromkeys(name for each in wide for name in each.ways))

    def add(self, name: str, seconds: Mapping[str, float]) -> None:
        """Keeps the times of a bundle in which each choice has the way of this name, where it may."""
        for each in self._choices:
            if name in each.ways:
                self._seconds[each.component, name] = seconds.get(each.component, 0.0)

    def fail(self, name: str, error: Exception) -> None:
        """Leaves out a way that cannot be built."""
        self._failed[name] = str(error)

    def taken(self, spec: Spec) -> tuple[Spec, tuple[str, ...]]:
        """Returns the spec with the fastest way of each choice, and a notice of each.

        Raises:
            BuildError: no way of a choice could be built.
        """
        notices = []
        for each in self._choices:
            timed = {name: self._seconds.get((each.component, name)) for name in each.ways}
            found = {name: seconds for name, seconds in timed.items() if seconds is not None}
            if not found and len(each.ways) > 1:
                reasons = "; ".join(f"{name}: {self._failed.get(name, 'not built')}" for name in each.ways)
                raise BuildError(f"{each.where}: nothing that fits could be built: {reasons}")
            name = min(found, key=lambda way: found[way]) if found else next(iter(each.ways))
            spec = settled(spec, [each], name)
            notices.append(self._notice(each, name, found))
        return spec, tuple(notices)

    def _notice(self, choice: Choice, name: str, found: Mapping[str, float]) -> str:
        others = [f"{other} {seconds:.3g} s" for other, seconds in found.items() if other != name]
        others += [f"{other} not built: {why}" for other, why in self._failed.items() if other in choice.ways]
        reason = f"{found[name]:.3g} s a call" if found else "the only one that fits"
        beside = f" ({'; '.join(others)})" if others else ""
        return f"{choice.where}: {name} for {choice.component}, {reason}{beside}"


def measure(
    spec: Spec, choices: Sequence[Choice], build: Callable[[Spec, Path, Callable[[Plan, Path], None]], object],
    beside: Path, stages: Stages,
) -> tuple[Spec, tuple[str, ...]]:  # fmt: skip
    """Builds a bundle with each way and calls it; gives the spec with the fastest way of each choice.

    Args:
        spec: which leaves the choices open.
        choices: those of the spec.
        build: compiles a spec into a folder, and gives the plan and the bundle's folder to a function before it
            publishes it.
        beside: where the bundles lie for a while, since there is room for one there.
        stages: told of each way.

    Returns:
        The spec with no choice left, and a notice of each.

    Raises:
        SpecError: the bundle is for another machine than this one, or for several.
        BuildError: no way of a choice can be built.
    """
    if not choices:
        return spec, ()
    measured = Measured(choices)
    if measured.names and (reason := _why_not_measured(spec)):
        raise SpecError(problems=[Problem(each.where, reason, _HINT) for each in choices])
    for name in measured.names:
        timed = _Timed(choices)
        with stages(f"measure {name}"), _room(beside) as room:
            try:
                build(settled(spec, choices, name).model_copy(update={"quality": None}), room / "bundle", timed)
            except BuildError as error:
                measured.fail(name, error)
                continue
        measured.add(name, timed.seconds)
    return measured.taken(spec)


def _why_not_measured(spec: Spec) -> str:
    """Returns why nothing can be measured for a spec here, whatever it is; "" if it can."""
    if len(spec.targets) > 1:
        return f"it is measured for one machine, and the spec has {len(spec.targets)} targets"
    if spec.parallel:
        return "it is measured in one process, and several share this bundle's calls"
    elsewhere = why_not_here(resolve_targets(spec)[0])
    return _elsewhere(elsewhere) if elsewhere else ""


def _elsewhere(reason: object) -> str:
    return f"it is measured on the machine that the bundle is for, and that is not this one: {reason}"


@contextmanager
def _room(beside: Path) -> Iterator[Path]:
    scratch = Scratch("measured", beside)
    try:
        yield scratch.path
    finally:
        scratch.remove()


class _Timed:
    """What times a bundle that is complete; `seconds` has the median of each component's time in a call."""

    def __init__(self, choices: Sequence[Choice]) -> None:
        self.seconds: dict[str, float] = {}
        self._choices = choices
        self._now: dict[str, float] = {}
        self._device = torch.device("cpu")

    def __call__(self, plan: Plan, root: Path) -> None:
        if plan.recording.reason:
            raise BuildError(f"nothing can be measured: {plan.recording.reason}")
        self._device = torch.device("cuda" if plan.targets[0].device == "cuda" else "cpu")
        try:
            with open_bundle(root) as bundle:
                verified = bundle.verify(roles={"program", "config"})
            options = LoadOptions(allow_native=True, check_engines=False)
            with verified, quiet_libraries(), load_verified(verified, None, self._device, options) as pipe:
                pipe.executor.observer = self._observed
                self._time(pipe, plan)
        except Incompatible as error:
            problems = [Problem(each.where, _elsewhere(error), _HINT) for each in self._choices]
            raise SpecError(problems=problems) from error

    def _time(self, pipe: CompiledPipeline, plan: Plan) -> None:
        for request, variant in zip(plan.recording.requests, pipe.variants, strict=True):
            keywords, seed = next(iter(cases_of(variant.programs, request, Lengths(text_end(pipe), variant.programs))))
            calls = []
            for _ in range(1 + RUNS):
                self._now = {}
                generator = torch.Generator().manual_seed(seed)
                given: dict[str, Any] = dict(request.fixed) | keywords
                pipe(**given, generator=generator, output_type="pt", allow_nan=True)
                calls.append(self._now)
            for name in self._now:
                self.seconds[name] = self.seconds.get(name, 0.0) + median(call[name] for call in calls[1:])

    @contextmanager
    def _observed(self, component: str) -> Iterator[None]:
        wait(self._device)
        began = time.perf_counter()
        yield
        wait(self._device)
        self._now[component] = self._now.get(component, 0.0) + time.perf_counter() - began
