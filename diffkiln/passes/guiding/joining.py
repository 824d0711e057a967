"""Two calls of a step: left as they are, joined to one of a doubled batch, or the prompt's alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from diffkiln.passes.caching import lanes_of
from diffkiln.passes.guiding.prompts import prompt_lane
from diffkiln.program import Op, Program, Ref, TensorType, drop_dead, map_refs, refs
from diffkiln.record.constants import Constants
from diffkiln.record.pipeline import Rebatched


def pairs_of(call: Program, component: str, wanted: int | None) -> list[tuple[int, ...]]:
    """For each step the places of its calls of a component."""
    steps: dict[int, list[int]] = {}
    for index, (step, _) in sorted(lanes_of(call, component, wanted).place.items()):
        steps.setdefault(step, []).append(index)
    return [tuple(places) for places in steps.values()]


def join(
    call: Program,
    component: str,
    pairs: Sequence[tuple[int, ...]],
    guided: Sequence[bool],
    doubled: Mapping[str, Rebatched],
    constants: Constants,
) -> Program:
    """Rewrite the two calls of every step.

    Args:
        call: the pipeline's call.
        component: whose calls are rewritten.
        pairs: their places.
        guided: for each step whether it is; one that is not takes what the call with the prompt gives for both.
        doubled: its programs at a doubled batch; empty where guided steps keep two calls.
        constants: of the recording.

    Raises:
        ValueError: the calls of a step are not alike, or need each other.
    """
    joints = _Joints(call, component, doubled, constants)
    later = [_later(call.ops, *pair) for pair in pairs]
    moved = {place for pair, after in zip(pairs, later, strict=True) for place in (pair[0], *after)}
    steps = {pair[1]: step for step, pair in enumerate(pairs)}
    ops: list[Op] = []
    for index, op in enumerate(call.ops):
        if (step := steps.get(index)) is not None:
            if index in later[step]:
                raise ValueError(f"the second call of {component} in step {step} needs what the first gives")
            ops += joints.ops_of(step, call.ops[pairs[step][0]], op, guided[step])
            ops += [joints.now(call.ops[place]) for place in later[step]]
        elif index not in moved:
            ops.append(joints.now(op))
    outputs = map_refs(call.outputs, joints.renamed)
    return drop_dead(replace(call, ops=tuple(ops), outputs=outputs, types={**call.types, **joints.types}))


def _later(ops: Sequence[Op], first: int, second: int) -> list[int]:
    """The places from one call to another of what needs the results of the first; it can wait for the second."""
    needed = set(ops[first].outputs)
    found: list[int] = []
    for place in range(first + 1, second + 1):
        if any(ref.name in needed for ref in refs((ops[place].args, ops[place].kwargs))):
            needed.update(ops[place].outputs)
            found.append(place)
    return found


class _Joints:
    """What takes the place of two calls, and the concatenated arguments, each made once."""

    def __init__(self, call: Program, component: str, doubled: Mapping[str, Rebatched], constants: Constants) -> None:
        self._call, self._component, self._doubled, self._constants = call, component, doubled, constants
        self._made = {name: op for op in call.ops for name in op.outputs}
        self._names: dict[str, Ref] = {}
        self._cats: dict[tuple[Ref, Ref], Ref] = {}
        self.types: dict[str, TensorType] = {}

    def renamed(self, ref: Ref) -> Ref:
        return self._names.get(ref.name, ref)

    def now(self, op: Op) -> Op:
        args, kwargs = map_refs((op.args, op.kwargs), self.renamed)
        return replace(op, args=args, kwargs=kwargs)

    def ops_of(self, step: int, first: Op, second: Op, guided: bool) -> list[Op]:
        """What stands in the place of both calls."""
        if first.attrs["program"] != second.attrs["program"]:
            raise ValueError(f"the two calls of {self._component} in step {step} have arguments of different types")
        pair = self.now(first), self.now(second)
        if guided and self._doubled:
            return self._joined(step, *pair)
        prompt = self._prompt(pair)
        kept, other = pair[prompt], pair[1 - prompt]
        if guided:
            return [kept, other]
        self._names |= dict(zip(other.outputs, map(Ref, kept.outputs), strict=True))
        return [kept]

    def _prompt(self, pair: tuple[Op, Op]) -> int:
        lanes = [tuple(refs(op.args)) for op in pair]
        found = prompt_lane(lanes, self._made, self._call.inputs, self._call.texts)
        if found is None:
            raise ValueError(f"which of the two calls of {self._component} in a step has the prompt cannot be told")
        return found

    def _joined(self, step: int, first: Op, second: Op) -> list[Op]:
        doubled = self._doubled[first.attrs["program"]]
        program = doubled.recorded.programs[doubled.program]
        written: list[Op] = []
        args: list[Ref] = []
        for source, item in zip(doubled.inputs, program.inputs, strict=True):
            assert source.arg is not None, "what is folded stays folded at a doubled batch"
            (one,), (two,) = refs(first.args[source.arg]), refs(second.args[source.arg])
            if not source.follows and one != two:
                raise ValueError(
                    f"{item.name[1:]} of {self._component} does not follow the batch, and the two calls of a step give "
                    "it different values"
                )
            args.append(self._cat(one, two, item.type, written) if source.follows else one)
        outputs = tuple(f"%{self._component}.{step}.joined.{index}" for index in range(len(program.outputs)))
        attrs = {**first.attrs, "program": doubled.program}
        written.append(Op(first.name, tuple(args), outputs, attrs=attrs))
        for name, given, one, two in zip(outputs, program.outputs, first.outputs, second.outputs, strict=True):
            self.types[name] = program.types[given.name]
            written.append(Op("aten.chunk.default", (Ref(name), 2), (one, two)))
        return written

    def _cat(self, one: Ref, two: Ref, type_: TensorType, written: list[Op]) -> Ref:
        if (one, two) not in self._cats:
            if one.name.startswith("#") and two.name.startswith("#"):
                made = f"#{self._constants.add_joined(one.name[1:], two.name[1:])}"
            else:
                made = f"%{self._component}.both.{sum(ref.name.startswith('%') for ref in self._cats.values())}"
                written.append(Op("aten.cat.default", ((one, two),), (made,)))
            self.types[made] = type_
            self._cats[one, two] = Ref(made)
        return self._cats[one, two]
