"""What each denoising step of a call computes, read off its program."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from diffkiln.program.ir import CALL, REGION, STEP, Module, Program

#: A step that runs all of a component's blocks, some, or none.
ALL, SOME, NONE = "●", "◐", "○"


@dataclass(frozen=True)
class Step:
    """One step: its timestep, how often it calls the component, and how many repeated blocks that runs."""

    number: int
    timestep: float
    calls: int
    blocks: int


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
        elif op.name == STEP:
            steps.append(Step(op.attrs["step"], op.attrs["timestep"], counted["calls"], counted["blocks"]))
            counted.clear()
    return steps


def line(steps: list[Step]) -> str:
    """One symbol a step: all of the blocks, some, or none. Without blocks, whether the component is called."""
    blocks = any(step.blocks for step in steps)
    work = [step.blocks if blocks else step.calls for step in steps]
    most = max(work, default=0)
    return "".join(ALL if done == most else SOME if done else NONE for done in work)
