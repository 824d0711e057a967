"""Two calls of a step: left as they are, joined to one of a doubled batch, or the prompt's alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from diffkiln.passes.guiding.prompts import prompt_branch
from diffkiln.program import Builder, Op, Program, Ref, TensorType, prune, refs
from diffkiln.record.constants import Constants
from diffkiln.record.pipeline import Rebatched


def join(
    call: Program,
    component: str,
    sites: Sequence[tuple[int, ...]],
    guided: Sequence[bool],
    doubled: Mapping[str, Rebatched],
    constants: Constants,
) -> Program:
    """Merges the two calls of every step into one.

    Args:
        call: the pipeline's call.
        component: whose calls are rewritten.
        sites: their places.
        guided: for each step whether it is; one that is not takes what the call with the prompt gives for both.
        doubled: its programs at a doubled batch; empty where guided steps keep two calls.
        constants: of the recording.

    Raises:
        ValueError: the calls of a step are not alike, or need each other.
    """
    edit = Builder(call)
    joints = _Joints(edit, component, doubled, constants)
    for step, (first, second) in enumerate(sites):
        later = waiting(call.ops, first, second)
        if second in later:
            raise ValueError(f"the second call of {component} in step {step} needs what the first gives")
        joined = joints.ops_of(step, first, second, guided[step])
        for index in (first, *later):
            edit.replace(index)
        edit.replace(second, *joined, *(call.ops[index] for index in later))
    return prune(edit.build())


def waiting(ops: Sequence[Op], first: int, second: int) -> list[int]:
    """Returns the places between two calls that need the first one's results, and so can wait for the second."""
    needed = set(ops[first].outputs)
    found: list[int] = []
    for index in range(first + 1, second + 1):
        if any(ref.name in needed for ref in ops[index].uses):
            needed.update(ops[index].outputs)
            found.append(index)
    return found


class _Joints:
    """The replacements of two calls, and the concatenated arguments, each made once."""

    def __init__(self, edit: Builder, component: str, doubled: Mapping[str, Rebatched], constants: Constants) -> None:
        self._edit, self._component, self._doubled, self._constants = edit, component, doubled, constants
        self._cats: dict[tuple[Ref, Ref], Ref] = {}

    def ops_of(self, step: int, first: int, second: int, guided: bool) -> list[Op]:
        """Returns the operations that replace both calls."""
        pair = tuple(self._edit.current(self._edit.program.ops[at]) for at in (first, second))
        if pair[0].attrs["program"] != pair[1].attrs["program"]:
            raise ValueError(f"the two calls of {self._component} in step {step} have arguments of different types")
        if guided and self._doubled:
            return self._joined(step, second, *pair)
        prompt = self._prompt(pair)
        kept, other = pair[prompt], pair[1 - prompt]
        if guided:
            return [kept, other]
        for name, result in zip(other.outputs, kept.results, strict=True):
            self._edit.replace_uses(name, result)
        return [kept]

    def _prompt(self, pair: Sequence[Op]) -> int:
        call_sites = [tuple(refs(op.args)) for op in pair]
        found = prompt_branch(call_sites, self._edit)
        if found is None:
            raise ValueError(f"which of the two calls of {self._component} in a step has the prompt cannot be told")
        return found

    def _joined(self, step: int, at: int, first: Op, second: Op) -> list[Op]:
        doubled = self._doubled[first.attrs["program"]]
        program = doubled.recorded.programs[doubled.program]
        args: list[Ref] = []
        for source, item in zip(doubled.inputs, program.inputs, strict=True):
            assert source.arg is not None, "constants stay folded at a doubled batch"
            (one,), (two,) = refs(first.args[source.arg]), refs(second.args[source.arg])
            if not source.follows and one != two:
                raise ValueError(
                    f"{item.argument} of {self._component} does not follow the batch, and the two calls of a step give "
                    "it different values"
                )
            args.append(self._cat(one, two, item.type, at) if source.follows else one)
        results = program.result_types(f"%{self._component}.{step}.joined")
        call = self._edit.op(first.name, tuple(args), results, attrs={**first.attrs, "program": doubled.program})
        half_batches = zip(call.results, first.outputs, second.outputs, strict=True)
        return [call, *(Op("aten.chunk.default", (result, 2), (one, two)) for result, one, two in half_batches)]

    def _cat(self, one: Ref, two: Ref, type_: TensorType, at: int) -> Ref:
        if (one, two) not in self._cats:
            if one.is_constant and two.is_constant:
                made = self._edit.constant(self._constants.add_joined(one.bare, two.bare), type_)
            else:
                stem = f"%{self._component}.both.{sum(ref.is_computed for ref in self._cats.values())}"
                cat = self._edit.op("aten.cat.default", ((one, two),), {stem: type_})
                self._edit.insert(at, cat)
                (made,) = cat.results
            self._cats[one, two] = made
        return self._cats[one, two]
