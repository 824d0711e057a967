"""A call of a doubled batch: in two of half the batch each, or the prompt's half alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from diffkiln.passes.guiding.half_batches import HalfBatches, without_chunks
from diffkiln.passes.guiding.prompts import prompt_branch
from diffkiln.program import Builder, Op, Program, Ref, prune, refs
from diffkiln.record.constants import Constants
from diffkiln.record.pipeline import Rebatched


def part(
    call: Program,
    component: str,
    sites: Sequence[int],
    guided: Sequence[bool],
    halved: Mapping[str, Rebatched],
    in_two: bool,
    constants: Constants,
) -> Program:
    """Splits the one call of every step into two.

    Args:
        call: the pipeline's call.
        component: whose calls are rewritten.
        sites: of its calls, one a step.
        guided: for each step whether it is; of one that is not, the half with the prompt runs, and stands for both.
        halved: the component's programs at half the batch.
        in_two: run the halves of guided steps one after the other; else their call stays as it is.
        constants: of the recording.

    Raises:
        ValueError: which half has the prompt cannot be told.
    """
    edit = Builder(call)
    parts = _Parts(edit, component, halved, constants)
    for step, at in enumerate(sites):
        if in_two or not guided[step]:
            parts.put(step, at, guided[step])
    without_chunks(edit, parts.given)
    return prune(edit.build())


class _Parts:
    """The replacements of a call of a doubled batch. `given` are the halves of its results."""

    def __init__(self, edit: Builder, component: str, halved: Mapping[str, Rebatched], constants: Constants) -> None:
        self._edit, self._component, self._halved = edit, component, halved
        self._half_batches = HalfBatches(edit, constants)
        self.given: dict[str, tuple[Ref, Ref]] = {}

    def put(self, step: int, at: int, guided: bool) -> None:
        """Puts the calls of a step, and its results put together, in the place of the one call."""
        op = self._edit.program.ops[at]
        half = self._halved[op.attrs["program"]]
        call_sites = [self._args(at, half, which) for which in (0, 1)]
        prompt = prompt_branch(call_sites, self._edit)
        if prompt is None:
            raise ValueError(
                f"{self._component} is not guided by a doubled batch, or which half of it has the prompt cannot be told"
            )
        # The prompt's comes first, so that it is the same branch in steps that have no other.
        which_run = (prompt, 1 - prompt) if guided else (prompt,)
        calls = {which: self._call_of(step, op, half, call_sites[which], which == prompt) for which in which_run}
        together: list[Op] = []
        for index, name in enumerate(op.outputs):
            first, second = (calls.get(which, calls[prompt]).results[index] for which in (0, 1))
            self.given[name] = first, second
            together.append(Op("aten.cat.default", ((first, second),), (name,)))
        self._edit.replace(at, *calls.values(), *together)

    def _args(self, at: int, half: Rebatched, which: int) -> list[Ref]:
        op, args = self._edit.program.ops[at], list[Ref]()
        for source, item in zip(half.inputs, half.recorded.programs[half.program].inputs, strict=True):
            if source.arg is None:
                assert source.half_batches is not None
                args.append(self._edit.constant(source.half_batches[which], item.type))
                continue
            (whole,) = refs(op.args[source.arg])
            args.append(self._half_batches.half(whole, which, at) if source.follows else whole)
        return args

    def _call_of(self, step: int, op: Op, half: Rebatched, args: Sequence[Ref], prompt: bool) -> Op:
        stem = f"%{self._component}.{step}.{'prompt' if prompt else 'negative'}"
        results = half.recorded.programs[half.program].result_types(stem)
        return self._edit.op(op.name, tuple(args), results, attrs={**op.attrs, "program": half.program})
