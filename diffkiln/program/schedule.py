"""What each denoising step of a call computes, read off its program."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from diffkiln.program.ir import CALL, REGION, STEP, Module, Program

#: A step that runs all of a component's blocks, some, or none; and one that another denoiser makes.
ALL, SOME, NONE, ANOTHER = "●", "◐", "○", "·"

#: The component that is what lies between a denoiser's calls, where that is compiled (diffkiln.passes.outlining).
SCHEDULER = "scheduler"


@dataclass(frozen=True)
class Step:
    """One step: its timestep, how often it calls the component, and how many repeated blocks that runs.

    `others` counts the calls of other components that have weights, the first step's text encoders among them.
    """

    number: int
    timestep: float
    calls: int
    blocks: int
    others: int = 0


def schedule(call: Program, modules: Mapping[str, Module], component: str) -> list[Step]:
    """The steps of a call, by what they compute of one component; empty where the call marks no steps."""
    sizes = {
        name: sum(op.name == REGION for op in program.ops) for name, program in modules[component].programs.items()
    }
    steps: list[Step] = []
    counted: Counter[str] = Counter()
    for op in call.ops:
        if op.name == CALL and op.attrs["component"] == component:
            counted.update(calls=1, blocks=sizes[op.attrs["program"]])
        elif op.name == CALL and op.attrs["component"] != SCHEDULER:
            counted["others"] += 1
        elif op.name == STEP:
            done = (counted[name] for name in ("calls", "blocks", "others"))
            steps.append(Step(op.attrs["step"], op.attrs["timestep"], *done))
            counted.clear()
    return steps


def line(steps: list[Step]) -> str:
    """One symbol a step: all of the blocks, some, or none, or another's. Without blocks, whether it is called."""
    blocks = any(step.blocks for step in steps)
    work = [step.blocks if blocks else step.calls for step in steps]
    most = max(work, default=0)
    return "".join(map(_symbol, steps, work, [most] * len(steps)))


def _symbol(step: Step, done: int, most: int) -> str:
    if not step.calls and step.others:
        return ANOTHER
    return ALL if done == most else SOME if done else NONE
