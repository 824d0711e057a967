"""A call of a doubled batch: in two of half the batch each, or the prompt's half alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from diffkiln.passes.guiding.halves import Halves, without_chunks
from diffkiln.passes.guiding.prompts import prompt_lane
from diffkiln.program import Op, Program, Ref, TensorType, drop_dead, refs
from diffkiln.record.constants import Constants
from diffkiln.record.pipeline import Rebatched


def part(
    call: Program,
    component: str,
    places: Sequence[int],
    guided: Sequence[bool],
    halved: Mapping[str, Rebatched],
    in_two: bool,
    constants: Constants,
) -> Program:
    """Rewrite the one call of every step.

    Args:
        call: the pipeline's call.
        component: whose calls are rewritten.
        places: of its calls, one a step.
        guided: for each step whether it is; of one that is not, the half with the prompt runs, and stands for both.
        halved: the component's programs at half the batch.
        in_two: run the halves of guided steps one after the other; else their call stays as it is.
        constants: of the recording.

    Raises:
        ValueError: which half has the prompt cannot be told.
    """
    parts = _Parts(call, component, halved, constants)
    steps = {place: step for step, place in enumerate(places)}
    ops: list[Op] = []
    for index, op in enumerate(call.ops):
        step = steps.get(index)
        if step is None or (guided[step] and not in_two):
            ops.append(op)
        else:
            ops += parts.ops_of(step, op, guided[step])
    types = {**call.types, **parts.types, **parts.halves.types}
    whole = replace(call, ops=tuple(ops), types=types)
    return drop_dead(replace(whole, ops=tuple(without_chunks(whole.ops, parts.given))))


class _Parts:
    """What takes the place of a call of a doubled batch. `given` are the halves of its results."""

    def __init__(self, call: Program, component: str, halved: Mapping[str, Rebatched], constants: Constants) -> None:
        self._call, self._component, self._halved = call, component, halved
        self.halves = Halves(call, constants)
        self.given: dict[str, tuple[Ref, Ref]] = {}
        self.types: dict[str, TensorType] = {}

    def ops_of(self, step: int, op: Op, guided: bool) -> list[Op]:
        half = self._halved[op.attrs["program"]]
        lanes = [self._args(op, half, which) for which in (0, 1)]
        prompt = prompt_lane(lanes, self.halves.made, self._call.inputs, self._call.texts)
        if prompt is None:
            raise ValueError(
                f"{self._component} is not guided by a doubled batch, or which half of it has the prompt cannot be told"
            )
        written = self.halves.take()
        results: dict[int, list[Ref]] = {}
        # The prompt's comes first, so that it is the same lane in steps that have no other.
        for which in (prompt, 1 - prompt) if guided else (prompt,):
            call, results[which] = self._call_of(step, op, half, lanes[which], which == prompt)
            written.append(call)
        for index, name in enumerate(op.outputs):
            first, second = (results.get(which, results[prompt])[index] for which in (0, 1))
            self.given[name] = first, second
            written.append(Op("aten.cat.default", ((first, second),), (name,)))
        return written

    def _args(self, op: Op, half: Rebatched, which: int) -> list[Ref]:
        args: list[Ref] = []
        program = half.recorded.programs[half.program]
        for source, item in zip(half.inputs, program.inputs, strict=True):
            if source.arg is None:
                assert source.halves is not None
                args.append(Ref(f"#{source.halves[which]}"))
                self.types[args[-1].name] = item.type
                continue
            (whole,) = refs(op.args[source.arg])
            args.append(self.halves.half(whole, which) if source.follows else whole)
        return args

    def _call_of(self, step: int, op: Op, half: Rebatched, args: Sequence[Ref], prompt: bool) -> tuple[Op, list[Ref]]:
        program = half.recorded.programs[half.program]
        word = "prompt" if prompt else "negative"
        names = tuple(f"%{self._component}.{step}.{word}.{index}" for index in range(len(program.outputs)))
        self.types |= {name: program.types[ref.name] for name, ref in zip(names, program.outputs, strict=True)}
        attrs = {**op.attrs, "program": half.program}
        return Op(op.name, tuple(args), names, attrs=attrs), list(map(Ref, names))
