"""A component's program in two: one that keeps values, and one that reuses them and computes less.

What is kept stands for a part of the program: the part's results less what came into it (its residual), or the results
themselves. The reusing program has kept values in the part's place; what nothing needs any more falls away by itself.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from diffkiln.program import REGION, Builder, Op, Program, Ref, TensorType, prune, refs


@dataclass(frozen=True)
class Kept:
    """A value of a program that a later step does not compute.

    With a `base`, the difference is kept, and added to the later step's own base.
    """

    value: str
    base: str | None = None


@dataclass(frozen=True)
class Split:
    """The programs of a step that keeps and of one that reuses.

    `keeping` gives what the original gives, and then what it keeps. `reusing` takes the inputs of the original whose
    positions `takes` lists, and then what was kept; it is None where what was kept is the result itself.
    """

    keeping: Program
    reusing: Program | None
    takes: tuple[int, ...]
    kept: int

    @property
    def programs(self) -> dict[str, Program]:
        """Returns both by name, as far as there are two."""
        return {program.name: program for program in (self.keeping, self.reusing) if program is not None}

    @property
    def kept_types(self) -> list[TensorType]:
        return [self.keeping.types[ref.name] for ref in self.keeping.outputs[-self.kept :]]


def split(program: Program, kept: Sequence[Kept]) -> Split:
    """Splits a component's program where values are kept."""
    return Split(_keeping(program, kept), *_reusing(program, kept), len(kept))


def _keeping(program: Program, kept: Sequence[Kept]) -> Program:
    edit = Builder(program, name=f"{program.name}.keeping")
    for index, item in enumerate(kept):
        given = Ref(item.value)
        if item.base is not None:
            type_ = program.types[item.value]
            residual = edit.op("aten.sub.Tensor", (given, Ref(item.base)), {f"%kept.{index}": type_})
            edit.append(residual)
            (given,) = residual.results
        edit.add_outputs(given)
    return edit.build()


def _reusing(program: Program, kept: Sequence[Kept]) -> tuple[Program | None, tuple[int, ...]]:
    edit = Builder(program, name=f"{program.name}.reusing")
    positions = {name: at for at, op in enumerate(program.ops) for name in op.outputs}
    sources: list[Ref] = []
    for index, item in enumerate(kept):
        source, at = edit.add_input(f"%kept.{index}", program.types[item.value]), positions[item.value]
        edit.rename_result(at, item.value, f"{item.value}.unread")
        sources.append(source)
        if item.base is None:
            edit.replace_uses(item.value, source)
        else:
            edit.insert(at + 1, Op("aten.add.Tensor", (Ref(item.base), source), (item.value,)))
    reusing = prune(edit.build())
    if not reusing.ops and list(reusing.outputs) == sources:
        return None, ()
    used = set(reusing.uses())
    takes = tuple(index for index, item in enumerate(program.inputs) if item.name in used)
    inputs = (*(program.inputs[index] for index in takes), *reusing.inputs[len(program.inputs) :])
    return Builder(reusing, inputs=inputs).build(), takes


# -- what may be kept --


def outputs_of(program: Program) -> tuple[Kept, ...]:
    """Returns the program's results: a step that reuses them calls nothing."""
    return tuple(Kept(ref.name) for ref in program.outputs)


def residuals(program: Program, regions: Mapping[str, Program], front: int, back: int) -> tuple[Kept, ...]:
    """Returns the sum that the repeated blocks add, without the first `front` and the last `back` blocks.

    A result of a block that is no later form of one of its arguments is kept as it is.
    """
    blocks = [op for op in program.ops if op.name == REGION]
    inside = blocks[front : len(blocks) - back]
    carried = _carried(blocks, regions)
    made = {name: (op, index) for op in inside for index, name in enumerate(op.outputs)}
    outer = [op for op in program.ops if id(op) not in {id(block) for block in inside}]
    read = {ref.name for op in outer for ref in op.uses} | {ref.name for ref in program.outputs}

    def origin(name: str) -> str | None:
        while name in made:
            op, index = made[name]
            slot = carried.get((op.attrs["region"], index))
            if slot is None:
                return None
            name = list(op.uses)[slot].name
        return name

    kept: list[Kept] = []
    for name in made:
        if name in read:
            base = origin(name)
            alike = base is not None and program.types[base] == program.types[name]
            kept.append(Kept(name, base if alike else None))
    return tuple(kept)


def _carried(blocks: Sequence[Op], regions: Mapping[str, Program]) -> Mapping[tuple[str, int], int]:
    """Returns (region, result) → the argument that the result replaces, as neighbours of one kind show.

    If no two neighbours show it, the only result of a block replaces its hidden states, or its first argument.
    """
    found: dict[tuple[str, int], int] = {}
    for before, after in itertools.pairwise(blocks):
        if before.attrs["region"] != after.attrs["region"]:
            continue
        positions = {ref.name: slot for slot, ref in enumerate(after.uses)}
        for index, name in enumerate(before.outputs):
            if name in positions:
                found.setdefault((before.attrs["region"], index), positions[name])
    for op in blocks:
        if len(op.outputs) == 1:
            names = [item.argument for item in regions[op.attrs["region"]].inputs]
            slot = names.index("hidden_states") if "hidden_states" in names else 0
            found.setdefault((op.attrs["region"], 0), slot)
    return found


def deep_features(program: Program, depth: int) -> tuple[Kept, ...]:
    """Returns the values that a UNet's upper path gets from below its last `depth` skip connections.

    Source: Ma, Fang and Wang, "DeepCache: Accelerating Diffusion Models for Free", 2023,
    https://arxiv.org/abs/2312.00858.
    """
    joints = skips(program)
    if depth > len(joints):
        return ()
    (deep, _) = tuple(refs(joints[-depth].args[0]))
    return (Kept(deep.name),)


def skips(program: Program) -> list[Op]:
    """Returns the places where a UNet's upper path joins the way down.

    Each is a concatenation (deep, skip) over channels before a residual block's first norm.
    """
    normed: Collection[str] = {
        ref.name
        for op in program.ops
        if op.name == "aten.group_norm.default" and any("up_blocks." in use.name for use in refs(op.args))
        for ref in list(refs(op.args))[:1]
    }
    return [
        op
        for op in program.ops
        if op.name == "aten.cat.default" and op.args[1:] == (1,) and op.outputs[0] in normed
        if len(list(refs(op.args[0]))) == 2
    ]
