"""What operators make of shards: how the result lies on the processes, and the arguments that give each its shard.

A rule is given an operation, of which an argument is in shards, and the types that it has with all tokens. It gives the
layout that every argument should have, the layouts of the results, and the literals that change. An operator without a
rule, or one that cannot work on shards, is given whole values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from diffkiln.passes.sequencing.layout import Layout
from diffkiln.program import Op, Ref, TensorType, refs


@dataclass(frozen=True)
class Case:
    """An operation on shards: `types` are those with all tokens, `layouts` those of its arguments, by name."""

    op: Op
    types: Mapping[str, TensorType]
    layouts: Mapping[str, Layout]
    count: int

    @property
    def first(self) -> Ref:
        """Returns its first argument, which is a value."""
        return next(refs(self.op.args))

    @property
    def layout(self) -> Layout | None:
        """Returns the layout of its first argument."""
        return self.layouts.get(self.first.name)

    @property
    def rank(self) -> int:
        """Returns the dimensions of its first argument."""
        return len(self.types[self.first.name].shape)

    def argument(self, index: int, name: str, default: Any = None) -> Any:
        """Returns an argument by its position, or by its name."""
        return self.op.args[index] if len(self.op.args) > index else self.op.kwargs.get(name, default)

    def axis(self, index: int, name: str = "dim", default: int = 0) -> int:
        """Returns a dimension of the first argument, counted from the front."""
        return int(self.argument(index, name, default)) % max(self.rank, 1)


@dataclass(frozen=True)
class Shared:
    """What a rule gives: the layouts of values among the arguments, those of the results, and new arguments."""

    given: Mapping[str, Layout]
    results: Sequence[Layout | None]
    args: tuple[Any, ...] | None = None
    kwargs: Mapping[str, Any] = field(default_factory=dict)


Rule = Callable[[Case], Shared | None]


def _alike(case: Case, layout: Layout, args: tuple[Any, ...] | None = None) -> Shared:
    """Returns the first argument in its layout, and all results in another."""
    assert case.layout is not None
    return Shared({case.first.name: case.layout}, [layout] * len(case.op.outputs), args)


def pointwise(case: Case) -> Shared | None:
    """Elements by elements, where shapes are broadcast."""
    rank = len(case.types[case.op.outputs[0]].shape)
    values = list(case.op.uses)
    found = [case.layouts[ref.name].at(_from_front(case, ref, rank)) for ref in values if ref.name in case.layouts]
    if len({layout.dim for layout in found}) != 1:
        return None
    # The layout with most segments is what others can be brought into.
    wanted = max(found, key=lambda layout: len(layout.segments))
    given: dict[str, Layout] = {}
    for ref in values:
        shape = case.types[ref.name].shape
        dim = wanted.dim - rank + len(shape)
        if dim >= 0 and shape[dim] != 1:
            given[ref.name] = wanted.at(dim)
    return Shared(given, [wanted] * len(case.op.outputs))


def _from_front(case: Case, ref: Ref, rank: int) -> int:
    return case.layouts[ref.name].dim + rank - len(case.types[ref.name].shape)


def same_front(case: Case) -> Shared | None:
    """A view that changes dimensions after the shards' one."""
    layout = case.layout
    return _alike(case, layout) if layout is not None and layout.dim < case.rank - 1 else None


def normalized(case: Case) -> Shared | None:
    """A normalization of the last dimensions."""
    layout, inner = case.layout, len(case.op.args[1])  # type: ignore[arg-type]
    return _alike(case, layout) if layout is not None and layout.dim < case.rank - inner else None


def along(case: Case) -> Shared | None:
    """An operation along dimensions that are not the shards'; `keepdim` may drop them."""
    layout, given = case.layout, case.argument(1, "dim")
    dims = [int(dim) % case.rank for dim in (given if isinstance(given, tuple | list) else (given,))]
    if layout is None or layout.dim in dims:
        return None
    kept = len(case.types[case.op.outputs[0]].shape) == case.rank
    return _alike(case, layout if kept else layout.at(layout.dim - sum(dim < layout.dim for dim in dims)))


def transpose(case: Case) -> Shared | None:
    one, two = case.axis(1, "dim0"), case.axis(2, "dim1")
    layout = case.layout
    return None if layout is None else _alike(case, layout.at({one: two, two: one}.get(layout.dim, layout.dim)))


def permute(case: Case) -> Shared | None:
    order = [int(dim) % case.rank for dim in case.argument(1, "dims")]
    return None if case.layout is None else _alike(case, case.layout.at(order.index(case.layout.dim)))


def unsqueeze(case: Case) -> Shared | None:
    at = int(case.argument(1, "dim")) % (case.rank + 1)
    layout = case.layout
    return None if layout is None else _alike(case, layout.at(layout.dim + (at <= layout.dim)))


def stack(case: Case) -> Shared | None:
    """Values of one shape, in shards alike, along a new dimension."""
    at = int(case.argument(1, "dim", 0)) % (case.rank + 1)
    found = {case.layouts.get(ref.name) for ref in case.op.uses}
    layout = next(iter(found))
    if len(found) != 1 or layout is None:
        return None
    given = {ref.name: layout for ref in case.op.uses}
    return Shared(given, [layout.at(layout.dim + (at <= layout.dim))])


def unbind(case: Case) -> Shared | None:
    at, layout = case.axis(1), case.layout
    if layout is None or at == layout.dim:
        return None
    return _alike(case, layout.at(layout.dim - (at < layout.dim)))


def reshape(case: Case) -> Shared | None:
    """A reshape that keeps the shards' dimension whole, and what is before it together."""
    layout, shape = case.layout, case.types[case.op.outputs[0]].shape
    if layout is None:
        return None
    before = math.prod(case.types[case.first.name].shape[: layout.dim])
    for dim, size in enumerate(shape):
        if size == layout.size and math.prod(shape[:dim]) == before:
            return _sized(case, layout.at(dim), shape)
    return None


def _sized(case: Case, layout: Layout, shape: Sequence[int]) -> Shared | None:
    """Returns an operation whose second argument is the shape of its result, where that is a literal."""
    if not case.op.name.startswith(("aten.reshape", "aten.view", "aten._unsafe_view", "aten.expand")):
        return _alike(case, layout)
    sizes = [size // case.count if dim == layout.dim else size for dim, size in enumerate(shape)]
    return _alike(case, layout, (case.first, tuple(sizes), *case.op.args[2:]))


def expand(case: Case) -> Shared | None:
    layout, shape = case.layout, case.types[case.op.outputs[0]].shape
    return None if layout is None else _sized(case, layout.at(layout.dim + len(shape) - case.rank), shape)


def repeat(case: Case) -> Shared | None:
    """Copies along other dimensions than the shards'; the first repeats may be of new dimensions."""
    repeats, layout = tuple(case.argument(1, "repeats")), case.layout
    if layout is None:
        return None
    dim = layout.dim + len(repeats) - case.rank
    return _alike(case, layout.at(dim)) if repeats[dim] == 1 else None


def slice_(case: Case) -> Shared | None:
    dim, layout = case.axis(1), case.layout
    if layout is None:
        return None
    if dim != layout.dim:
        return _alike(case, layout)
    start, end, step = case.argument(2, "start", 0), case.argument(3, "end"), case.argument(4, "step", 1)
    size = layout.size
    start = min(max(start + size if (start or 0) < 0 else start or 0, 0), size)
    end = size if end is None else min(max(end + size if end < 0 else end, 0), size)
    kept = layout.within(start, end) if step == 1 else None
    if kept is None:
        return None
    return _alike(case, kept, (case.first, dim, start // case.count, end // case.count))


def split(case: Case) -> Shared | None:
    """Parts of given sizes."""
    dim, layout = case.axis(2), case.layout
    if layout is None:
        return None
    if dim != layout.dim:
        return _alike(case, layout)
    sizes, offset, kept = case.argument(1, "split_sizes"), 0, []
    for size in sizes:
        kept.append(layout.within(offset, offset + size))
        offset += size
    if None in kept:
        return None
    parts = tuple(size // case.count for size in sizes)
    return Shared({case.first.name: layout}, kept, (case.first, parts, dim))


def chunk(case: Case) -> Shared | None:
    layout = case.layout
    return _alike(case, layout) if layout is not None and case.axis(2) != layout.dim else None


def cat(case: Case) -> Shared | None:
    """Values one after the other: along the shards' dimension their segments are, too."""
    values = list(case.op.uses)
    dim = int(case.argument(1, "dim", 0)) % case.rank
    found = [case.layouts[ref.name] for ref in values if ref.name in case.layouts]
    if len({layout.dim for layout in found}) != 1:
        return None
    if found[0].dim != dim:
        wanted = max(found, key=lambda layout: len(layout.segments))
        return Shared({ref.name: wanted for ref in values}, [wanted])
    given, segments = {}, []
    for ref in values:
        own = case.layouts.get(ref.name) or Layout(dim, (case.types[ref.name].shape[dim],))
        given[ref.name] = own
        segments += own.segments
    return Shared(given, [Layout(dim, tuple(segments))])


def unflatten(case: Case) -> Shared | None:
    dim, layout = case.axis(1), case.layout
    if layout is None or dim == layout.dim:
        return None
    more = len(case.types[case.op.outputs[0]].shape) - case.rank
    return _alike(case, layout.at(layout.dim + (more if dim < layout.dim else 0)))


def as_strided(case: Case) -> Shared | None:
    """A view of a value whose elements lie in their order, with the value's own dimensions: strides before the shards'
    dimension shrink with it. It may have some of the segments alone, such as the tokens of an image after those of a
    text."""
    scatter = case.op.name == "aten.as_strided_scatter.default"
    sizes, strides, offset = case.op.args[2:5] if scatter else (*case.op.args, 0)[1:4]
    layout, shape = case.layout, case.types[case.first.name].shape
    if layout is None or len(sizes) != len(shape):  # type: ignore[arg-type]
        return None
    inner = math.prod(shape[layout.dim + 1 :])
    start, rest = divmod(offset, inner)  # type: ignore[operator]
    kept = layout.within(start, start + sizes[layout.dim])  # type: ignore[index,operator]
    if kept is None or strides[layout.dim] != inner or any(s % layout.size for s in strides[: layout.dim]):  # type: ignore[index,operator]
        return None
    offset = start // case.count * inner + rest
    small = tuple(size // case.count if dim == layout.dim else size for dim, size in enumerate(sizes))  # type: ignore[arg-type]
    steps = tuple(s // case.count if dim < layout.dim else s for dim, s in enumerate(strides))  # type: ignore[arg-type]
    given = {case.first.name: layout}
    if not scatter:
        return Shared(given, [kept], (case.first, small, steps, offset))
    source: Any = case.op.args[1]
    return Shared({**given, source.name: kept}, [layout], (case.first, source, small, steps, offset))


def linear(case: Case) -> Shared | None:
    layout = case.layout
    return _alike(case, layout) if layout is not None and layout.dim < case.rank - 1 else None


def _named(names: str) -> list[str]:
    return [f"aten.{name}" for name in names.split()]


_GROUPS: list[tuple[Rule, str]] = [
    (
        pointwise,
        "add.Tensor sub.Tensor mul.Tensor div.Tensor add.Scalar sub.Scalar mul.Scalar div.Scalar rsub.Scalar "
        "neg.default silu.default gelu.default relu.default sigmoid.default tanh.default exp.default "
        "pow.Tensor_Scalar rsqrt.default sqrt.default sin.default cos.default abs.default clamp.default "
        "to.dtype to.dtype_layout _to_copy.default clone.default contiguous.default alias.default "
        "detach.default copy.default zeros_like.default where.self logical_not.default bitwise_not.default "
        "type_as.default softplus.default reciprocal.default square.default",
    ),
    (same_front, "view_as_complex.default view_as_real.default"),
    (normalized, "layer_norm.default rms_norm.default"),
    (along, "mean.dim sum.dim_IntList softmax.int _softmax.default squeeze.dim select.int"),
    (transpose, "transpose.int"),
    (permute, "permute.default"),
    (unsqueeze, "unsqueeze.default"),
    (stack, "stack.default"),
    (unbind, "unbind.int"),
    (reshape, "reshape.default view.default _unsafe_view.default flatten.using_ints"),
    (expand, "expand.default"),
    (repeat, "repeat.default"),
    (slice_, "slice.Tensor"),
    (split, "split_with_sizes.default"),
    (chunk, "chunk.default"),
    (cat, "cat.default concat.default"),
    (unflatten, "unflatten.int"),
    (as_strided, "as_strided.default as_strided_scatter.default"),
    (linear, "linear.default"),
]
#: By operator.
RULES: Mapping[str, Rule] = {name: rule for rule, names in _GROUPS for name in _named(names)}
#: Operators that compute every element by itself.
POINTWISE = frozenset(name for name, rule in RULES.items() if rule is pointwise)
