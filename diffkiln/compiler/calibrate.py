"""Runs the real pipeline, before a schedule is chosen, and measures what reuse costs it at each step.

It replays the recorded programs with the components' weights in memory, all of them at once. Nothing here decides what
is kept: that is the `cache_schedule` whose steps are wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from diffkiln.bundle import BundleWriter
from diffkiln.bundle.layout import calibration_file
from diffkiln.compiler.in_memory import InMemory
from diffkiln.compiler.packed import as_json
from diffkiln.compiler.plan import Plan
from diffkiln.compiler.stages import Stages
from diffkiln.compiler.tokenizers import tokenizers_of
from diffkiln.errors import BuildError, SpecError
from diffkiln.interpreter.aten import Interpreter
from diffkiln.interpreter.layers.scaled import row_scales
from diffkiln.interpreter.quiet import quiet_libraries
from diffkiln.models.meta import load_module
from diffkiln.models.weights import weights_of
from diffkiln.passes import manager
from diffkiln.passes.base import Pass
from diffkiln.passes.caching import Mask, Split, apply_schedule, call_sites_of, cheapest, evenly, with_kept
from diffkiln.program import CALL, STEP, Builder, Op, Program, Ref, split_off
from diffkiln.record.pipeline import Recording
from diffkiln.runtime.executor import Executor
from diffkiln.runtime.pipeline import CompiledPipeline
from diffkiln.runtime.text import TextEnd
from diffkiln.runtime.variants import CompiledVariant

#: Gives a number for images [prompts, …] from 0 to 1, float32, and the prompts that they were drawn for.
Metric = Callable[[torch.Tensor, Sequence[str]], float]


class Calibration(Protocol):
    """The options of the pass that chooses a schedule's steps; `texts` are its prompts."""

    component: str
    seed: int
    computed: int | None
    tried: int
    metric: str
    at_least: float | None

    @property
    def texts(self) -> tuple[str, ...]: ...
    def options(self) -> dict[str, Any]: ...


class Schedule(Protocol):
    """The pass whose steps are chosen."""

    def splits(self, recording: Recording) -> dict[str, Split]: ...
    def with_steps(self, mask: Mask) -> Pass: ...


@dataclass(frozen=True)
class Evidence:
    """The reasons for a schedule's steps.

    Attributes:
        mask: which steps compute.
        costs: costs[kept][last], how far the latents drift when all steps after `kept` up to `last` reuse what it has
            kept: the square of the sum of what each does to them, against the last latents, mean over the prompts.
        measured: the metric on the images of each schedule that was tried.
    """

    mask: Mask
    costs: list[list[float]]
    measured: Mapping[Mask, float]

    def as_json(self, calibrate: Calibration) -> dict[str, Any]:
        tried = [{"steps": list(map(int, mask)), "metric": _short(value)} for mask, value in self.measured.items()]
        return {
            **calibrate.options(),
            "texts": list(calibrate.texts),
            "steps": list(map(int, self.mask)),
            "costs": [list(map(_short, row)) for row in self.costs],
            "tried": tried,
        }


def _short(value: float) -> float:
    return float(f"{value:.6g}")


def calibrate(plan: Plan, writer: BundleWriter, metrics: Mapping[str, Metric], stages: Stages) -> Plan:
    """Returns the plan with the steps of schedules chosen by the real pipeline; the measurements go into the bundle."""
    for item in plan.listed:
        if not plan.recording.calls or not any(fact.name == "calibrated" for fact in item.step.provides()):
            continue
        calibration: Any = item.step
        component = item.step.component
        after = [chosen for chosen in plan.listed if chosen.step.component == component]
        chosen = next(chosen for chosen in after if "calibrated" in chosen.step.takes)
        schedule: Any = chosen.step
        with stages(f"calibrate the schedule of {component}"), quiet_libraries():
            modules = {name: load_module(plan.source, name, plan.dtype) for name in plan.state.modules}
            for name, module in modules.items():
                manager.apply(module, name, plan.listed)
            with manager.guarded(item), row_scales():
                evidence = calibrated(plan.recording, plan.pipe, modules, calibration, schedule, metrics)
        writer.write(calibration_file(component), as_json(evidence.as_json(calibration)), "doc")
        plan = plan.choosing(chosen, schedule.with_steps(evidence.mask))
    return plan


def calibrated(
    recording: Recording,
    pipe: Any,
    modules: Mapping[str, torch.nn.Module],
    calibrate: Calibration,
    schedule: Schedule,
    metrics: Mapping[str, Metric],
) -> Evidence:
    """Chooses the steps of a schedule.

    Args:
        recording: of the call, not rewritten.
        pipe: the meta model, for its tokenizers.
        modules: every component with its weights, after the passes.
        calibrate: the prompts, and what is wanted.
        schedule: whose steps are to be chosen.
        metrics: functions by name; psnr is known.

    Raises:
        SpecError: there is no such metric.
        BuildError: the metric stays below its floor for every schedule.
    """
    run = _Real(recording, pipe, modules, calibrate)
    splits = schedule.splits(recording)
    measure = _metric(calibrate, metrics, run)
    if not any(op.name == STEP for op in run.call.ops):
        raise BuildError(f"calibrate: the call of {type(pipe).__name__} does not tell where its steps end")
    count = len(call_sites_of(run.call, calibrate.component).sites)
    if count < 2 or (calibrate.computed or 1) >= count:
        raise BuildError(f"calibrate: {calibrate.component} is called in {count} steps, so none would reuse")
    costs = _costs(run, splits, calibrate.component)
    measured: dict[Mask, float] = {}

    def value(mask: Mask) -> float:
        if mask not in measured:
            measured[mask] = float(measure(run.images(mask, splits), calibrate.texts))
        return measured[mask]

    count = calibrate.computed or _fewest(costs, value, calibrate)
    tried = [*cheapest(costs, count, calibrate.tried), evenly(len(costs), count)]
    return Evidence(max(tried, key=value), costs, measured)


def _metric(calibrate: Calibration, metrics: Mapping[str, Metric], run: _Real) -> Metric:
    if calibrate.metric in metrics:
        return metrics[calibrate.metric]
    if calibrate.metric != "psnr":
        known = ", ".join(sorted({"psnr", *metrics}))
        raise SpecError(f"calibrate: there is no metric {calibrate.metric!r}, only {known}. Give it to compile()")
    reference = run.images(None, {})

    def psnr(images: torch.Tensor, _prompts: Sequence[str]) -> float:
        error = (images - reference).square().flatten(1).mean(1).clamp_min(1e-12)
        return float((-10 * error.log10()).mean())

    return psnr


def _fewest(costs: list[list[float]], value: Callable[[Mask], float], calibrate: Calibration) -> int:
    """Returns the fewest computed steps that keep the metric, by bisection: more steps give better images."""
    floor, count = float(calibrate.at_least or 0.0), len(costs)
    low, high, best = 1, count, float("-inf")
    while low < high:
        middle = (low + high) // 2
        found = value(cheapest(costs, middle)[0])
        best = max(best, found)
        low, high = (low, middle) if found >= floor else (middle + 1, high)
    if low == count:
        raise BuildError(
            f"calibrate: {calibrate.metric} stays below {floor:g} for every schedule that reuses a step (the best gave "
            f"{best:g}). Lower at_least, or remove the schedule"
        )
    return low


# -- running --


class _Real:
    """The recorded call with real weights, for every prompt."""

    def __init__(
        self, recording: Recording, pipe: Any, modules: Mapping[str, torch.nn.Module], calibrate: Calibration
    ) -> None:
        self.recording, self._calibrate = recording, calibrate
        self.weights = {name: dict(weights_of(module)) for name, module in modules.items()}
        self.call = recording.calls[0]["call"]
        self._text = TextEnd(tokenizers_of(recording, pipe))
        self._class_name = type(pipe).__name__

    def images(self, mask: Mask | None, splits: Mapping[str, Split]) -> torch.Tensor:
        """Returns the call's images, with or without a schedule: [prompts, …] from 0 to 1."""
        component = self._calibrate.component
        call = (
            self.call
            if mask is None
            else apply_schedule(self.call, component, call_sites_of(self.call, component), mask, splits)
        )
        return torch.cat([self.run(call, splits, index)[0].float() for index in range(len(self._calibrate.texts))])

    def run(self, call: Program, splits: Mapping[str, Split], prompt: int) -> list[torch.Tensor]:
        """Returns all results of a form of the call for one prompt."""
        executor = self._executor(splits)
        variant = CompiledVariant("calibrated", {}, {"call": call})
        compiled = CompiledPipeline(self._class_name, [variant], executor, self._text, None)
        texts = [self._calibrate.texts[prompt]] * variant.batch_size
        inputs = list(compiled._inputs(variant, call, compiled._split({"prompt": texts})))
        generator = torch.Generator().manual_seed(self._calibrate.seed + prompt)
        return executor(call, inputs, generator)

    def reuse(self, part: Split, inputs: Sequence[torch.Tensor], kept: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Returns the results of a step that reuses, for its own arguments and the values that another step kept."""
        if part.reusing is None:
            return list(kept)
        taken = [inputs[position] for position in part.takes]
        executor = self._executor({part.reusing.name: part})
        return executor.run_component(self._calibrate.component, part.reusing.name, [*taken, *kept])

    def _executor(self, splits: Mapping[str, Split]) -> Executor:
        component = self._calibrate.component
        module = self.recording.modules[component]
        more = {name: program for part in splits.values() for name, program in part.programs.items()}
        modules = {**self.recording.modules, component: replace(module, programs={**module.programs, **more})}
        store: Any = InMemory(self.weights)
        return Executor(modules, store, self.recording.constants.tensors, {}, torch.device("cpu"))


# -- what reuse costs --


def _costs(run: _Real, splits: Mapping[str, Split], component: str) -> list[list[float]]:
    traced = _Traced(run.call, component, splits)
    count = len(traced.steps)
    total = torch.zeros(count, count, dtype=torch.float64)
    for prompt in range(len(run._calibrate.texts)):
        values = dict(zip(traced.names, run.run(traced.program, splits, prompt), strict=True))
        size = traced.latents(values, count - 1).norm()
        for kept in range(count):
            drift = torch.zeros((), dtype=torch.float64)
            for step in range(kept + 1, count):
                drift = drift + traced.change(run, values, kept, step)
                total[kept, step] += float((drift.norm() / size) ** 2)
    return (total / len(run._calibrate.texts)).tolist()


@dataclass(frozen=True)
class _Site:
    """One call of the component within a step."""

    at: int
    op: Op
    part: Split
    kept: tuple[Ref, ...]


class _Traced:
    """The call with everything kept at every step, and its steps' ends as programs of their own.

    `program` gives the values named `names`: what was kept, the arguments of the component's calls, and what goes into
    the end of each step.
    """

    def __init__(self, call: Program, component: str, splits: Mapping[str, Split]) -> None:
        self._call = call
        call_sites, edit = call_sites_of(call, component), Builder(call, outputs=())
        self.steps: list[list[_Site]] = [[] for _ in call_sites.sites]
        for at, (step, branch) in call_sites.step_of.items():
            op, part = call.ops[at], splits[call.ops[at].attrs["program"]]
            keeping = with_kept(edit, op, part, f"%traced.{step}.{branch}")
            edit.replace(at, keeping)
            self.steps[step].append(_Site(at, op, part, keeping.results[-part.kept :]))
        self._tails = [self._tail(sites) for sites in self.steps]
        wanted: dict[Ref, None] = {}
        for sites, tail in zip(self.steps, self._tails, strict=True):
            made = {name for site in sites for name in site.op.outputs}
            kept = [ref for site in sites for ref in site.kept]
            arguments = [ref for site in sites for ref in site.op.uses if ref.is_computed]
            read = [item.ref for item in tail.inputs if item.name not in made]
            wanted |= dict.fromkeys([*kept, *arguments, *read, *tail.outputs])
        self.names = tuple(ref.name for ref in wanted)
        edit.add_outputs(*wanted)
        self.program = edit.build()

    def _tail(self, sites: Sequence[_Site]) -> Program:
        """Returns the program from the component's results to the latents at the step's end."""
        ops, first, last = self._call.ops, sites[0].at, sites[-1].at
        end = next((at for at in range(last, len(ops)) if ops[at].name == STEP), len(ops) - 1)
        positions = [at for at in range(first, end) if ops[at].name != CALL]
        return split_off(self._call, positions, tuple(ops[end].uses)[:1])

    def latents(self, values: Mapping[str, torch.Tensor], step: int) -> torch.Tensor:
        """Returns the latents after a step, float64."""
        return values[self._tails[step].outputs[0].name].double()

    def change(self, run: _Real, values: Mapping[str, torch.Tensor], kept: int, step: int) -> torch.Tensor:
        """Returns the change of the latents after `step` if it reuses the values of step `kept`; float64."""
        constants = run.recording.constants.tensors

        def value(ref: Ref) -> torch.Tensor:
            return constants[ref.bare] if ref.is_constant else values[ref.name]

        changed: dict[str, torch.Tensor] = {}
        for source, site in zip(self.steps[kept], self.steps[step], strict=True):
            given = run.reuse(site.part, list(map(value, site.op.uses)), list(map(value, source.kept)))
            changed |= dict(zip(site.op.outputs, given, strict=True))
        tail = self._tails[step]
        inputs = [changed[item.name] if item.name in changed else values[item.name] for item in tail.inputs]
        with torch.inference_mode():
            (found,) = Interpreter(tail, "cpu")(inputs, {}, constants)
        return found.double() - self.latents(values, step)


__all__ = ["Evidence", "Metric", "calibrate", "calibrated"]
