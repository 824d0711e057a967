"""Measures the working memory of a bundle on this CPU, in a process of its own.

    python -m diffkiln.runtime.working BUNDLE

It loads the bundle within the smallest limit that its calls keep, and runs the call that takes the most on zeros,
twice: what comes before the loop, one step, and what comes after. What the kernel saw while a component ran, less what
is planned for that component and what the process had after its imports, is working memory, and the most of it counts.
The answer is a line of JSON: `target`, `bytes` and `threads`, or the `reason` why nothing was measured.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from diffkiln.bundle import Verified, open_bundle
from diffkiln.errors import DiffkilnError
from diffkiln.guards.host_memory import forget_highest, highest, present, return_memory
from diffkiln.interpreter.aten import dtype_of
from diffkiln.program import Program
from diffkiln.program.ir import Input
from diffkiln.program.moments import DENOISE
from diffkiln.program.planner import PlannedCall, Planner
from diffkiln.program.residency import TooSmall
from diffkiln.program.schedule import why_whole
from diffkiln.runtime.loading import LoadOptions, load_verified
from diffkiln.runtime.memory import offload_policy, planner_of
from diffkiln.runtime.opening import read_modules, read_variant
from diffkiln.runtime.pipeline import CompiledPipeline
from diffkiln.runtime.targets import choose_target

#: The most additions and multiplications of a call that is measured: five times those of the largest pipeline in
#: benchmarks/results/memory.md.
MOST_WORK = 4e12
#: What is measured is rounded up to a multiple of `NOTCH`: two builds mostly agree. `MARGIN` is added before, so
#: that other calls stay below it.
NOTCH, MARGIN = 16 * 2**20, 12 * 2**20
#: So many calls are made: what one leaves behind is part of the next, and the C library does not do the same each time.
CALLS = 2
_CPU = torch.device("cpu")


def main(bundle: str) -> int:
    """Measures a bundle and prints the answer. Returns the exit code."""
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)  # what libraries print is no answer
        print(json.dumps(answer(bundle)), file=answers)
    return 0


def answer(bundle: str) -> dict[str, Any]:
    """Returns what was measured of a bundle: `target`, `bytes` and `threads`, or the `reason` why nothing was."""
    before = present()
    try:
        with open_bundle(bundle) as opened:
            verified = opened.verify(roles={"program", "config", "native"})
        with verified:
            return _measured(verified, before)
    except (DiffkilnError, OSError) as error:  # a sandbox's kernel may not tell memory
        return {"reason": str(error)}


def _measured(verified: Verified, before: int) -> dict[str, Any]:
    limit = _smallest(verified)
    gc.collect()  # what was read to find it is no part of a load
    return_memory()
    target = choose_target(verified.manifest, _CPU, verified.targets) or next(iter(_targets(verified)))
    options = LoadOptions(allow_native=True, check_engines=False, max_memory=limit)
    with load_verified(verified, None, _CPU, options) as pipe:
        planner = _planner(verified, limit)
        programs = [program for variant in pipe.variants for program in variant.programs.values()]
        call = max(programs, key=lambda program: planner(program).residency.peak)
        plan = planner(call)
        if (work := _work(call, plan)) > MOST_WORK:
            return {"reason": f"a step and what is around it are {work / 1e12:.1f} TFLOP, more than {MOST_WORK / 1e12}"}
        taken = _taken(pipe, call, plan, before)
    planned = planner.working.nbytes if planner.working else 0
    nbytes = -(-(taken + planned + MARGIN) // NOTCH) * NOTCH
    return {"target": target, "bytes": nbytes, "threads": torch.get_num_threads()}


def _targets(verified: Verified) -> dict[str, str]:
    found: Any = verified.manifest.runtime.get("targets", {})
    return found


def _planner(verified: Verified, limit: int) -> Planner:
    manifest, modules = verified.manifest, read_modules(verified)
    variants = [read_variant(verified, index, modules) for index in range(len(manifest.pipeline.variants))]
    policy = offload_policy(manifest, _CPU, limit)
    return planner_of(verified, modules, policy, variants, manifest.weights, _CPU)


def _smallest(verified: Verified) -> int:
    """Returns the smallest limit that all calls keep, in bytes."""
    manifest, modules = verified.manifest, read_modules(verified)
    variants = [read_variant(verified, index, modules) for index in range(len(manifest.pipeline.variants))]
    planner = planner_of(verified, modules, offload_policy(manifest, _CPU, 1), variants, manifest.weights, _CPU)
    needed = 1
    for program in (program for variant in variants for program in variant.programs.values()):
        try:
            planner(program)
        except TooSmall as error:
            needed = max(needed, error.needed)
    return needed


def _work(call: Program, plan: PlannedCall) -> float:
    """Returns the additions and multiplications of a call that is cut short after its first step, if it can be."""
    steps = {phase.name: phase.steps if phase.name == DENOISE and not why_whole(call) else 1 for phase in plan.phases}
    return sum(phase.work.total / max(steps[phase.name], 1) for phase in plan.phases)


def _taken(pipe: CompiledPipeline, call: Program, plan: PlannedCall, before: int) -> int:
    """Returns the most memory beyond the plan that a component took, in bytes; less than none where it took less."""
    planned: dict[str, int] = {}
    for moment, total in zip(plan.moments, plan.residency.memory, strict=True):
        planned[moment.component] = max(planned.get(moment.component, 0), total)
    taken = [highest() - before - plan.residency.peak]

    @contextlib.contextmanager
    def watched(component: str) -> Iterator[None]:
        forget_highest()
        yield
        taken.append(highest() - before - planned[component])

    def stop(_step: int, _timestep: float, latents: torch.Tensor) -> torch.Tensor:
        if not why_whole(call):
            pipe.executor.interrupt()
        return latents

    pipe.executor.observer = watched
    for seed in range(CALLS):
        pipe.executor(call, _zeros(call.inputs), torch.Generator().manual_seed(seed), stop, allow_nan=True)
    return max(taken)


def _zeros(inputs: Sequence[Input]) -> list[Any]:
    return [
        float(item.source["default"] or 1.0)
        if item.source.get("kind") == "scalar"
        else torch.zeros(item.type.shape, dtype=dtype_of(item.type.dtype))
        for item in inputs
    ]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
