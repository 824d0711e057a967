"""A program over shards: operations on the process's own tokens where a rule allows, and on whole values elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from diffkiln.passes.sequencing.layout import Layout, local
from diffkiln.passes.sequencing.rules import RULES, Case
from diffkiln.program import ALL_GATHER, SHARD, Op, Program, Ref, TensorType, map_refs, written_anew
from diffkiln.program.mesh import SEQUENCE


class Resegment(Exception):
    """Raised where an input should come in other segments, which its caller can give it in."""

    def __init__(self, name: str, segments: tuple[int, ...]) -> None:
        super().__init__(name)
        self.name, self.segments = name, segments


class Sharing:
    """A program over shards, written line by line.

    Args:
        program: with all tokens.
        count: processes that share them.
        layouts: of its inputs that come in shards.
        others: what writes operations that are no operators with a rule, by their names.

    Attributes:
        ops, types, layouts: what was written so far; a value has its old name, and a shard's type.
    """

    def __init__(
        self,
        program: Program,
        count: int,
        layouts: Mapping[str, Layout],
        others: Mapping[str, Callable[[Sharing, Op], bool]],
    ) -> None:
        self.program, self.count, self._others = program, count, others
        self.layouts = dict(layouts)
        self.ops: list[Op] = []
        self.types: dict[str, TensorType] = {
            name: local(type_, self.layouts.get(name), count) for name, type_ in program.types.items()
        }
        self._origins = {item.name: item.name for item in program.inputs}
        self._known: dict[tuple[str, Layout | None], Ref] = {}

    def run(self) -> Sharing:
        """Writes all operations."""
        for op in self.program.ops:
            other = self._others.get(op.name)
            if other is None or not other(self, op):
                self._write(op)
        return self

    def built(self, outputs: Sequence[Ref]) -> Program:
        """Returns what was written as a program."""
        return written_anew(self.program, self.ops, self.types, outputs)

    def _write(self, op: Op) -> None:
        case = Case(
            op,
            self.program.types,
            {r.name: self.layouts[r.name] for r in op.uses if r.name in self.layouts},
            self.count,
        )
        rule = RULES.get(op.name)
        shared = rule(case) if rule is not None and case.layouts else None
        if shared is None:
            self.whole(op)
            return

        def given(ref: Ref) -> Ref:
            return self.value(ref, shared.given.get(ref.name))

        args = op.args if shared.args is None else shared.args
        self.add(replace(op, args=map_refs(args, given), kwargs=map_refs(op.kwargs, given)), shared.results)
        self._follow(op, case, shared.results)

    def whole(self, op: Op) -> None:
        """Writes an operation as it is, on whole values."""

        def given(ref: Ref) -> Ref:
            return self.value(ref, None)

        self.add(
            replace(op, args=map_refs(op.args, given), kwargs=map_refs(op.kwargs, given)), [None] * len(op.outputs)
        )

    def add(self, op: Op, layouts: Sequence[Layout | None]) -> None:
        """Writes an operation of which each result has a layout."""
        self.ops.append(op)
        for name, layout in zip(op.outputs, layouts, strict=True):
            if layout is not None:
                self.layouts[name] = layout
            self.types[name] = local(self.program.types[name], layout, self.count)

    def _follow(self, op: Op, case: Case, results: Sequence[Layout | None]) -> None:
        """Notes that results are views of an input alone, which then can come in other segments."""
        values = [ref for ref in op.uses if ref.is_computed]
        if len(values) == 1 and (origin := self._origins.get(values[0].name)):
            for name, layout in zip(op.outputs, results, strict=True):
                if layout is not None and case.layout is not None and layout.segments == case.layout.segments:
                    self._origins[name] = origin

    # -- one value in several layouts --

    def value(self, ref: Ref, layout: Layout | None) -> Ref:
        """Returns a value in a layout, gathered or sharded where it has another.

        Raises:
            Resegment: it is an input in other segments.
            ValueError: it has no equal shards.
        """
        found = self.layouts.get(ref.name)
        if found == layout:
            return ref
        if found is not None and layout is not None and found.dim == layout.dim and ref.name in self._origins:
            raise Resegment(self._origins[ref.name], layout.segments)
        if (ref.name, layout) not in self._known:
            if found is not None:
                whole = self._gathered(ref, found)
                self._known[ref.name, None] = whole
            if layout is not None:
                self._known[ref.name, layout] = self._sharded(ref, self._known.get((ref.name, None), ref), layout)
        return self._known[ref.name, layout]

    def made(self, name: str, args: tuple[Any, ...], type_: TensorType, stem: str, **attrs: Any) -> Ref:
        """Writes an operation of one result, which has a new name after a stem."""
        count = sum(stem in known for known in self.types)
        output = f"{stem}.{count}"
        self.types[output] = type_
        self.ops.append(
            Op(name, args, (output,), attrs={"axis": SEQUENCE, "count": self.count, **attrs} if attrs else {})
        )
        return Ref(output)

    def _gathered(self, ref: Ref, layout: Layout) -> Ref:
        """Returns a value with all tokens in their order."""
        type_, whole = self.types[ref.name], self.program.types[ref.name]
        stem = ref.name if ref.is_computed else f"%{ref.bare}"
        names = tuple(f"{stem}.of.{rank}" for rank in range(self.count))
        self.types |= dict.fromkeys(names, type_)
        self.ops.append(Op(ALL_GATHER, (ref,), names, attrs={"axis": SEQUENCE, "count": self.count}))
        pieces = [Ref(name) for name in names]
        if len(layout.segments) > 1:
            pieces = self._in_order(pieces, layout, type_)
        return self.made("aten.cat.default", (tuple(pieces), layout.dim), whole, f"{stem}.whole")

    def _in_order(self, pieces: Sequence[Ref], layout: Layout, type_: TensorType) -> list[Ref]:
        """Returns the parts of all shards, segment by segment."""
        found: list[Ref] = []
        offset = 0
        for size in layout.segments:
            part = size // self.count
            found += [self.sliced(piece, type_, layout.dim, offset, part) for piece in pieces]
            offset += part
        return found

    def sliced(self, ref: Ref, type_: TensorType, dim: int, start: int, size: int) -> Ref:
        """Returns so many elements of a dimension of a value."""
        shape = (*type_.shape[:dim], size, *type_.shape[dim + 1 :])
        stem = f"%{ref.bare}.part"
        return self.made("aten.slice.Tensor", (ref, dim, start, start + size), replace(type_, shape=shape), stem)

    def _sharded(self, ref: Ref, whole: Ref, layout: Layout) -> Ref:
        """Returns the process's own shard of a whole value."""
        type_ = self.program.types[ref.name]
        self.check(ref.bare, layout)
        shards: list[Ref] = []
        offset = 0
        for size in layout.segments:
            part = whole
            if len(layout.segments) > 1:
                part = self.sliced(whole, type_, layout.dim, offset, size)
            shape = (*type_.shape[: layout.dim], size // self.count, *type_.shape[layout.dim + 1 :])
            shards.append(self.made(SHARD, (part,), replace(type_, shape=shape), f"%{ref.bare}.own", dim=layout.dim))
            offset += size
        if len(shards) == 1:
            return shards[0]
        own = local(type_, layout, self.count)
        return self.made("aten.cat.default", (tuple(shards), layout.dim), own, f"%{ref.bare}.own")

    def check(self, name: str, layout: Layout) -> None:
        """Raises `ValueError` if a segment has no equal parts."""
        for size in layout.segments:
            if size % self.count:
                raise ValueError(
                    f"{name} of {self.program.name} has {size} tokens, which {self.count} processes cannot share "
                    f"evenly: choose a size whose tokens are a multiple of {self.count}, or fewer processes"
                )
