"""Parts that compute the same of different inputs, each on a process of its own; then all have the results."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import replace

from diffkiln.passes.tiling.parts import Part
from diffkiln.program import ALL_GATHER, OWN, Mesh, Op, Program, Ref, TensorType, map_refs, written_anew
from diffkiln.program.mesh import AXES


def spread_parts(program: Program, parts: Sequence[Part], mesh: Mesh) -> tuple[Program, int]:
    """Shares the parts of a program among all processes of a mesh, in rounds of one part for each.

    Args:
        program: of a component, or a call of a pipeline.
        parts: its own, none of which needs another. Those that no other is equal to are computed by every process, and
            so is one that is left over.
        mesh: the processes.

    Returns:
        The program, and how many parts one process computes of those that are shared.
    """
    alike: dict[str, list[Part]] = {}
    for part in parts:
        alike.setdefault(part.form, []).append(part)
    shared = [group for group in alike.values() if len(group) > 1]
    return _Spreading(program, mesh).run(shared)


class _Spreading:
    """A program whose parts are shared, written line by line."""

    def __init__(self, program: Program, mesh: Mesh) -> None:
        self.program, self.mesh = program, mesh
        self.axes = [axis for axis in reversed(AXES) if mesh.count(axis) > 1]
        self.types: dict[str, TensorType] = dict(program.types)
        self._count = 0

    def run(self, groups: Sequence[Sequence[Part]]) -> tuple[Program, int]:
        size = self.mesh.size
        rounds = [group[at : at + size] for group in groups for at in range(0, len(group), size)]
        shared = [turn for turn in rounds if len(turn) > 1]
        moved = {at for turn in shared for part in turn for at in part.positions}
        last = max(moved, default=0)
        made = {name for at in moved for name in self.program.ops[at].outputs}
        before: list[Op] = []
        after: list[Op] = []
        for at, op in enumerate(self.program.ops):
            if at in moved:
                continue
            later = at > last or any(ref.name in made for ref in op.uses)
            (after if later else before).append(op)
            if later:
                made.update(op.outputs)
        lines = [op for turn in shared for op in self._round(turn)]
        program = written_anew(self.program, [*before, *lines, *after], self.types, self.program.outputs)
        return program, len(rounds)

    def _round(self, turn: Sequence[Part]) -> Iterator[Op]:
        """Yields the operations of a process's own part of a round, before and after those that all share."""
        # Where a round has fewer parts than there are processes, several compute the last one.
        every = [*turn, *[turn[-1]] * (self.mesh.size - len(turn))]
        names: dict[str, str] = {}
        for index, name in enumerate(every[0].inputs):
            own = yield from self._own([part.inputs[index] for part in every])
            names[name] = own
        for at in every[0].positions:
            op = self.program.ops[at]
            names |= {name: self._new(f"{name}.own", self.program.types[name]) for name in op.outputs}
            yield _renamed(op, names)
        alike: dict[TensorType, list[int]] = {}
        for index, name in enumerate(every[0].outputs):
            alike.setdefault(self.types[names[name]], []).append(index)
        for indices in alike.values():
            own = [names[every[0].outputs[index]] for index in indices]
            yield from self._given(own, [[part.outputs[index] for index in indices] for part in turn])

    def _own(self, values: Sequence[str]) -> Generator[Op, None, str]:
        """Yields what gives each process its own of so many values; the innermost axis first. Returns its name."""
        if len(set(values)) == 1:
            return values[0]
        for axis in self.axes:
            count = self.mesh.count(axis)
            attrs = {"axis": axis, "count": count}
            found: list[str] = []
            for at in range(0, len(values), count):
                listed = values[at : at + count]
                found.append(self._new(f"%{Ref(listed[0]).bare}.own", self.types[listed[0]]))
                yield Op(OWN, tuple(map(Ref, listed)), (found[-1],), attrs=attrs)
            values = found
        return values[0]

    def _given(self, own: Sequence[str], wanted: Sequence[Sequence[str]]) -> Iterator[Op]:
        """Yields what gives every process the values of one type that all have, under the names that are wanted.

        They come in one exchange: each has a latency.
        """
        type_ = self.types[own[0]]
        if len(own) == 1 or not type_.shape:
            for index, name in enumerate(own):
                yield from self._gathered(name, [names[index] for names in wanted])
            return
        rows = type_.shape[0]
        all_type = replace(type_, shape=(rows * len(own), *type_.shape[1:]))
        together = self._new(f"{own[0]}.together", all_type)
        yield Op("aten.cat.default", (tuple(map(Ref, own)), 0), (together,))
        found = [self._new(f"{together}.of", all_type) for _ in wanted]
        yield from self._gathered(together, found)
        for whole, names in zip(found, wanted, strict=True):
            for index, name in enumerate(names):
                yield Op("aten.slice.Tensor", (Ref(whole), 0, index * rows, (index + 1) * rows), (name,))

    def _gathered(self, own: str, wanted: Sequence[str]) -> Iterator[Op]:
        """Yields what gives every process the values of all, under the names that are wanted."""
        found = [own]
        for number, axis in enumerate(self.axes):
            count = self.mesh.count(axis)
            last = number == len(self.axes) - 1
            grown: list[list[str]] = []
            for index, name in enumerate(found):
                names = []
                for other in range(count):
                    rank = other * len(found) + index
                    is_named = last and rank < len(wanted)
                    names.append(wanted[rank] if is_named else self._new(f"{own}.of", self.types[own]))
                yield Op(ALL_GATHER, (Ref(name),), tuple(names), attrs={"axis": axis, "count": count})
                grown.append(names)
            found = [names[other] for other in range(count) for names in grown]

    def _new(self, stem: str, type_: TensorType) -> str:
        self._count += 1
        while (name := f"{stem}.{self._count}") in self.types:
            self._count += 1
        self.types[name] = type_
        return name


def _renamed(op: Op, names: Mapping[str, str]) -> Op:
    def new(ref: Ref) -> Ref:
        return Ref(names.get(ref.name, ref.name))

    outputs = tuple(names[name] for name in op.outputs)
    return Op(op.name, map_refs(op.args, new), outputs, map_refs(op.kwargs, new), op.attrs)
