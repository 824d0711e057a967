"""Values of a call at half their batch: the parts that a doubled batch was put together from, or slices of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from diffkiln.program import Arg, Op, Program, Ref, TensorType, map_refs, refs
from diffkiln.record.constants import Constants

#: Operators that give each row of a batch what they would give it alone: half of the result is theirs for the halves.
_ROW_BY_ROW = frozenset(
    f"aten.{name}"
    for name in (
        "add.Tensor", "sub.Tensor", "mul.Tensor", "div.Tensor", "add.Scalar", "sub.Scalar", "mul.Scalar", "div.Scalar",
        "rsub.Scalar", "neg.default", "to.dtype", "to.dtype_layout", "clone.default", "contiguous.default",
        "alias.default", "detach.default", "bitwise_not.default", "eq.Scalar", "ne.Scalar", "gt.Scalar",
    )
)  # fmt: skip


class Halves:
    """Halves of the first dimension of a call's values. Each is written once.

    Args:
        call: whose values are halved.
        constants: where halves of constants go.

    Attributes:
        ops: what has been written and not been taken yet.
        types: of what has been written.
        made: every operation of the call, and those that were written, by results.
    """

    def __init__(self, call: Program, constants: Constants) -> None:
        self._call, self._constants = call, constants
        self.made = {name: op for op in call.ops for name in op.outputs}
        self.types: dict[str, TensorType] = {}
        self.ops: list[Op] = []
        self._known: dict[tuple[str, int], Ref] = {}
        self._same: dict[tuple[object, ...], Ref] = {}

    def take(self) -> list[Op]:
        """The operations that were written since the last time."""
        taken, self.ops = self.ops, []
        return taken

    def half(self, ref: Ref, which: int) -> Ref:
        """The first half of a value, or the second."""
        key = ref.name, which
        if key not in self._known:
            self._known[key] = self._constant(ref, which) if ref.name.startswith("#") else self._computed(ref, which)
        return self._known[key]

    def _type(self, ref: Ref) -> TensorType:
        return self.types.get(ref.name) or self._call.types[ref.name]

    def _constant(self, ref: Ref, which: int) -> Ref:
        half = self._constants.tensors[ref.name[1:]].chunk(2)[which]
        found = Ref(f"#{self._constants.add(half)}")
        self.types[found.name] = _halved(self._type(ref))
        return found

    def _computed(self, ref: Ref, which: int) -> Ref:
        op = self.made.get(ref.name)
        if op is not None:
            if op.name in ("aten.cat.default", "aten.concat.default") and (parts := self._parts(op, ref, which)):
                return parts[0] if len(parts) == 1 else self._write(op, (tuple(parts),), ref, which)
            if op.name == "aten.repeat.default" and self._is_repeated_twice(op, ref):
                (source,) = refs(op.args)
                return source
            if op.name in _ROW_BY_ROW and self._is_row_by_row(op, ref):
                args = map_refs(op.args, lambda arg: self.half(arg, which) if self._follows(arg, ref) else arg)
                return self._write(op, args, ref, which)
        size = self._type(ref).shape[0] // 2
        slice_ = Op("aten.slice.Tensor", (), ())
        return self._write(slice_, (ref, 0, which * size, (which + 1) * size), ref, which)

    def _parts(self, op: Op, ref: Ref, which: int) -> list[Ref]:
        """The parts of a concatenation that make up a half of it; none where it is of another dimension or cut."""
        together, *dim = op.args
        if dim not in ([], [0]) or op.kwargs:
            return []
        half, begin = self._type(ref).shape[0] // 2, 0
        found: list[Ref] = []
        for part in refs(together):
            end = begin + self._type(part).shape[0]
            if begin < half < end:
                return []
            if (begin >= half) == bool(which):
                found.append(part)
            begin = end
        return found

    def _is_repeated_twice(self, op: Op, ref: Ref) -> bool:
        (source,) = refs(op.args)
        return self._type(source) == _halved(self._type(ref))

    def _is_row_by_row(self, op: Op, ref: Ref) -> bool:
        """Whether every operand has the batch as its first dimension, or is the same for every row."""
        whole = self._type(ref).shape
        shapes = [self._type(arg).shape for arg in refs((op.args, op.kwargs))]
        alike = all(len(shape) < len(whole) or shape[0] in (1, whole[0]) for shape in shapes)
        return alike and not any(True for _ in refs(op.kwargs))

    def _follows(self, arg: Ref, ref: Ref) -> bool:
        shape, whole = self._type(arg).shape, self._type(ref).shape
        return len(shape) == len(whole) and shape[0] == whole[0]

    def _write(self, op: Op, args: tuple[Arg, ...], ref: Ref, which: int) -> Ref:
        """One operation that gives a half; both halves are one value where they are computed from the same."""
        key = (op.name, args, tuple(sorted(op.kwargs.items(), key=lambda item: item[0])))
        if key not in self._same:
            name = f"{ref.name}.half.{which}"
            written = replace(op, args=args, outputs=(name,))
            self.ops.append(written)
            self.made[name] = written
            self.types[name] = _halved(self._type(ref))
            self._same[key] = Ref(name)
        return self._same[key]


def _halved(type_: TensorType) -> TensorType:
    return replace(type_, shape=(type_.shape[0] // 2, *type_.shape[1:]))


def without_chunks(ops: Iterable[Op], halves: dict[str, tuple[Ref, Ref]]) -> Iterable[Op]:
    """The operations, with the halves of a value in the place of what would cut it in two again."""
    renamed: dict[str, Ref] = {}

    def now(arg: object) -> Any:
        return map_refs(arg, lambda ref: renamed.get(ref.name, ref))

    for op in ops:
        args, kwargs = now((op.args, op.kwargs))
        source = args[0] if args and isinstance(args[0], Ref) else None
        if (
            op.name == "aten.chunk.default"
            and args[1:] in ((2,), (2, 0))
            and source is not None
            and source.name in halves
        ):
            renamed |= dict(zip(op.outputs, halves[source.name], strict=True))
            continue
        yield replace(op, args=args, kwargs=kwargs)
