"""What each denoising step of a call computes, read off its program."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from diffkiln.program.ir import CALL, NOISE, REGION, STEP, Module, Op, Program, refs

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
    """Returns the steps of a call, with what each computes of one component; empty if the call marks no steps."""
    sizes = {
        name: sum(op.name == REGION for op in program.ops) for name, program in modules[component].programs.items()
    }
    steps: list[Step] = []
    counted: Counter[str] = Counter()
    for op in call.ops:
        if op.name == CALL and is_ahead(op, modules):
            continue
        if op.name == CALL and op.attrs["component"] == component:
            counted.update(calls=1, blocks=sizes[op.attrs["program"]])
        elif op.name == CALL and op.attrs["component"] != SCHEDULER:
            counted["others"] += 1
        elif op.name == STEP:
            done = (counted[name] for name in ("calls", "blocks", "others"))
            steps.append(Step(op.attrs["step"], op.attrs["timestep"], *done))
            counted.clear()
    return steps


def is_ahead(op: Op, modules: Mapping[str, Module]) -> bool:
    """Returns True if a CALL operation runs a program that prepares the denoising loop, a preamble."""
    module = modules.get(op.attrs["component"])
    return module is not None and module.programs[op.attrs["program"]].ahead


def last_step(call: Program) -> int:
    """Returns the place of the operation that ends the last step.

    Raises:
        ValueError: the call marks no steps.
    """
    return max(index for index, op in enumerate(call.ops) if op.name == STEP)


def why_whole(call: Program) -> str:
    """Returns why no steps can be left out of a call that is running; empty where they can."""
    ends = [index for index, op in enumerate(call.ops) if op.name == STEP]
    if not ends:
        return "it shows no steps"
    if len({call.types[call.ops[index].outputs[0]] for index in ends}) > 1:
        return "its steps are of several sizes"
    between = {name for op in call.ops[ends[0] + 1 : ends[-1]] for name in op.outputs}
    after = {ref.name for op in call.ops[ends[-1] + 1 :] for ref in refs((op.args, op.kwargs))}
    after |= {ref.name for ref in call.outputs}
    return "what follows the last step needs more of it than the latents" if between & after else ""


def why_unseen(call: Program) -> str:
    """Returns why the latents of a step cannot be decoded while the call goes on; empty where they can.

    What follows the last step must need nothing else of the steps, and draw no noise: the caller's generator would give
    the call other noise than without.
    """
    if reason := why_whole(call):
        return reason
    draws = any(op.name == NOISE for op in call.ops[last_step(call) + 1 :])
    return "what follows the last step draws noise" if draws else ""


def line(steps: list[Step]) -> str:
    """Returns one symbol a step: all blocks, some, none, or another step's. Without blocks: called or not."""
    blocks = any(step.blocks for step in steps)
    work = [step.blocks if blocks else step.calls for step in steps]
    most = max(work, default=0)
    return "".join(map(_symbol, steps, work, [most] * len(steps)))


def _symbol(step: Step, done: int, most: int) -> str:
    if not step.calls and step.others:
        return ANOTHER
    return ALL if done == most else SOME if done else NONE
