"""Values of a call at half their batch: the parts that a doubled batch was put together from, or slices of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from diffkiln.program import Arg, Builder, Op, Ref, TensorType, map_refs, refs
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


class HalfBatches:
    """Halves of the first dimension of a call's values. Each is written once, where it is first needed.

    Args:
        edit: of the call whose values are halved.
        constants: where halves of constants go.
    """

    def __init__(self, edit: Builder, constants: Constants) -> None:
        self._edit, self._constants, self._type = edit, constants, edit.type_of
        self._known: dict[tuple[str, int], Ref] = {}
        self._same: dict[tuple[object, ...], Ref] = {}

    def half(self, ref: Ref, which: int, at: int) -> Ref:
        """Returns the first half of a value, or the second, for the operation at a place."""
        key = ref.name, which
        if key not in self._known:
            self._known[key] = self._constant(ref, which) if ref.is_constant else self._computed(ref, which, at)
        return self._known[key]

    def _constant(self, ref: Ref, which: int) -> Ref:
        half = self._constants.tensors[ref.bare].chunk(2)[which]
        return self._edit.constant(self._constants.add(half), _halved(self._type(ref)))

    def _computed(self, ref: Ref, which: int, at: int) -> Ref:
        op = self._edit.makers.get(ref.name)
        if op is not None:
            if op.name in ("aten.cat.default", "aten.concat.default") and (parts := self._parts(op, ref, which)):
                return parts[0] if len(parts) == 1 else self._write(op, (tuple(parts),), ref, which, at)
            if op.name == "aten.repeat.default" and self._is_repeated_twice(op, ref):
                (source,) = refs(op.args)
                return source
            if op.name in _ROW_BY_ROW and self._is_row_by_row(op, ref):
                args = map_refs(op.args, lambda arg: self.half(arg, which, at) if self._follows(arg, ref) else arg)
                return self._write(op, args, ref, which, at)
        size = self._type(ref).shape[0] // 2
        slice_ = Op("aten.slice.Tensor", (), ())
        return self._write(slice_, (ref, 0, which * size, (which + 1) * size), ref, which, at)

    def _parts(self, op: Op, ref: Ref, which: int) -> list[Ref]:
        """Returns the parts of a concatenation that make up a half; none if it is of another dimension or cut."""
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
        """Returns True if every operand has the batch as its first dimension, or is the same for every row."""
        whole = self._type(ref).shape
        shapes = [self._type(arg).shape for arg in refs((op.args, op.kwargs))]
        alike = all(len(shape) < len(whole) or shape[0] in (1, whole[0]) for shape in shapes)
        return alike and not any(True for _ in refs(op.kwargs))

    def _follows(self, arg: Ref, ref: Ref) -> bool:
        shape, whole = self._type(arg).shape, self._type(ref).shape
        return len(shape) == len(whole) and shape[0] == whole[0]

    def _write(self, op: Op, args: tuple[Arg, ...], ref: Ref, which: int, at: int) -> Ref:
        """Writes one operation that gives a half; both halves are one value if they are computed from the same."""
        key = (op.name, args, tuple(sorted(op.kwargs.items(), key=lambda item: item[0])))
        if key not in self._same:
            result = {f"{ref.name}.half.{which}": _halved(self._type(ref))}
            written = self._edit.op(op.name, args, result, op.kwargs, op.attrs)
            self._edit.insert(at, written)
            (self._same[key],) = written.results
        return self._same[key]


def _halved(type_: TensorType) -> TensorType:
    return replace(type_, shape=(type_.shape[0] // 2, *type_.shape[1:]))


def without_chunks(edit: Builder, half_batches: Mapping[str, tuple[Ref, Ref]]) -> None:
    """Has the halves of a value stand in the place of what would cut it in two again."""
    for at, op in enumerate(edit.program.ops):
        if op.name == "aten.chunk.default" and op.args[1:] in ((2,), (2, 0)):
            (source,) = refs(op.args)
            if source.name in half_batches:
                edit.replace(at)
                for name, half in zip(op.outputs, half_batches[source.name], strict=True):
                    edit.replace_uses(name, half)
