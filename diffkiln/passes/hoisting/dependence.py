"""What the values of a program depend on: nothing but weights, the schedule, the request, or the latents."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import Flag
from functools import reduce
from operator import or_

from diffkiln.program import CALL, NOISE, REGION, STEP, Module, Op, Program


class Depends(Flag):
    """The sources of a value's changes: a call's constants, such as timesteps; what the caller gives; the latents.

    A value with no flag depends on weights alone.
    """

    SCHEDULE = 1
    REQUEST = 2
    LATENTS = 4


#: On weights alone.
NOTHING = Depends(0)

#: By the names of a program's values.
Found = Mapping[str, Depends]
#: What the results of an operation depend on, given the arguments'.
Called = Callable[[Op, Sequence[Depends]], Sequence[Depends]]


def together(several: Iterable[Depends]) -> Depends:
    """Returns what depends on any of them."""
    return reduce(or_, several, NOTHING)


def spread(program: Program, given: Sequence[Depends], called: Called | None = None) -> dict[str, Depends]:
    """Returns what every value of a component's program or a region depends on.

    Args:
        program: its inputs depend on what is `given`, in order.
        called: for REGION operations; else a result depends on all arguments.
    """
    found = dict(zip((item.name for item in program.inputs), given, strict=True))
    for op in program.ops:
        args = [found.get(ref.name, NOTHING) for ref in op.uses]
        alike = [together(args)] * len(op.outputs)
        results = called(op, args) if called is not None and op.name == REGION else alike
        found.update(zip(op.outputs, results, strict=True))
    return found


def of_region(region: Program, args: Sequence[Depends]) -> list[Depends]:
    """Returns what the results of a region depend on; if nothing follows the latents, the region is one operation."""
    if Depends.LATENTS not in together(args):
        return [together(args)] * len(region.outputs)
    found = spread(region, args)
    return [found.get(ref.name, NOTHING) for ref in region.outputs]


def of_call(call: Program, component: str) -> dict[str, Depends]:
    """Returns what the values of a call depend on. Noise, and results of the component, are latents."""
    found = {item.name: _of_source(item.source) for item in call.inputs}
    for op in call.ops:
        # What other components make of constants is known when a request comes, since it takes their weights.
        on = together(found.get(ref.name, NOTHING) for ref in op.uses) | Depends.REQUEST
        if op.name in (NOISE, STEP) or (op.name == CALL and op.attrs["component"] == component):
            on |= Depends.LATENTS
        found |= dict.fromkeys(op.outputs, on)
    return found | {f"#{key}": Depends.SCHEDULE for key in call.constants}


def _of_source(source: Mapping[str, object]) -> Depends:
    latents = source.get("kind") == "tensor" and source.get("keyword") == "latents"
    return Depends.LATENTS if latents else Depends.REQUEST


def of_regions(module: Module, given: Mapping[str, Sequence[Depends]]) -> dict[str, list[Depends]]:
    """Returns what the inputs of each region depend on, in all its calls together that follow the latents.

    All blocks of one class share one program, so a value counts as what it is in any of them.

    Args:
        given: what each program's inputs depend on, by the program's name.
    """
    joint: dict[str, list[Depends]] = {}

    def called(op: Op, args: Sequence[Depends]) -> Sequence[Depends]:
        name = op.attrs["region"]
        if Depends.LATENTS in together(args):
            before = joint.get(name, [NOTHING] * len(args))
            args = joint[name] = [old | new for old, new in zip(before, args, strict=True)]
        return of_region(module.regions[name], args)

    before: dict[str, list[Depends]] | None = None
    while before != joint:
        before = dict(joint)
        for name, program in module.programs.items():
            spread(program, given[name], called)
    return joint
