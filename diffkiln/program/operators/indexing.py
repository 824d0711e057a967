"""Operators that follow indices. Torch checks each index on a CPU; elsewhere the interpreter clamps them."""

from __future__ import annotations

from typing import Any

from diffkiln.program.ir import TensorType
from diffkiln.program.operators.table import axis, broadcast, flag, integer, number, one_of, operator, require, tensor

INDEX_DTYPES = ("int64", "int32")


def _index(value: Any) -> TensorType:
    given = tensor(value)
    require(given.dtype in INDEX_DTYPES, f"an index is of int64 or int32, not of {given.dtype}")
    return given


@operator("embedding")
def _embedding(
    weight: Any, indices: Any, padding_idx: Any = -1, scale_grad_by_freq: Any = False, sparse: Any = False
) -> TensorType:
    table, rows = tensor(weight), _index(indices)
    integer(padding_idx)
    flag(scale_grad_by_freq)
    flag(sparse)
    require(len(table.shape) == 2, "an embedding has rows and columns")
    return TensorType(table.dtype, (*rows.shape, table.shape[1]))


def _one_index(index: Any) -> TensorType:
    given = _index(index)
    require(len(given.shape) <= 1, "the index has one dimension")
    return given


@operator("index_select")
def _index_select(self: Any, dim: Any, index: Any) -> TensorType:
    given = tensor(self)
    at = axis(dim, len(given.shape))
    if not given.shape:
        require(_one_index(index).numel == 1, "a number has one element")
        return given
    return TensorType(given.dtype, (*given.shape[:at], _one_index(index).numel, *given.shape[at + 1 :]))


@operator("index_copy")
def _index_copy(self: Any, dim: Any, index: Any, source: Any) -> TensorType:
    given, part = tensor(self), tensor(source)
    require(part.dtype == given.dtype, f"{part} is not copied into {given}")
    require(part.shape == _index_select(self, dim, index).shape, f"{part} is not what {given} takes")
    return given


@operator("index_add")
def _index_add(self: Any, dim: Any, index: Any, source: Any, *, alpha: Any = 1) -> TensorType:
    number(alpha)
    return _index_copy(self, dim, index, source)


@operator("index_fill.int_Scalar", "index_fill.int_Tensor")
def _index_fill(self: Any, dim: Any, index: Any, value: Any) -> TensorType:
    given = tensor(self)
    axis(dim, len(given.shape))
    require(_one_index(index).dtype == "int64", "index_fill takes int64")
    if isinstance(value, TensorType):
        require(value.shape == (), "index_fill takes a value without dimensions")
    else:
        number(value)
    return given


@operator("gather")
def _gather(self: Any, dim: Any, index: Any, *, sparse_grad: Any = False) -> TensorType:
    flag(sparse_grad)
    given, where = tensor(self), _index(index)
    at = axis(dim, len(given.shape))
    require(where.dtype == "int64", "gather takes int64")
    require(len(where.shape) == len(given.shape), "the index has as many dimensions as the tensor")
    for other, size in enumerate(where.shape):
        require(other == at or size <= given.shape[other], f"{where} is larger than {given}")
    return TensorType(given.dtype, where.shape)


@operator("take_along_dim")
def _take_along_dim(self: Any, indices: Any, dim: Any = None) -> TensorType:
    given, where = tensor(self), _index(indices)
    require(dim is not None and where.dtype == "int64", "take_along_dim takes int64 and a dimension")
    at = axis(dim, len(given.shape))
    require(len(where.shape) == len(given.shape) > 0, "the index has as many dimensions as the tensor")
    sides = [(*item.shape[:at], 1, *item.shape[at + 1 :]) for item in (given, where)]
    rest = broadcast(*sides)
    return TensorType(given.dtype, (*rest[:at], where.shape[at], *rest[at + 1 :]))


@operator("scatter.src", "scatter_add")
def _scatter(self: Any, dim: Any, index: Any, src: Any) -> TensorType:
    given, part, where = tensor(self), tensor(src), _index(index)
    require(part.dtype == given.dtype, f"{part} is not scattered into {given}")
    require(len(part.shape) == len(given.shape), "the source has as many dimensions as the tensor")
    at = axis(dim, len(given.shape))
    require(len(where.shape) == len(given.shape) and where.dtype == "int64", "scatter takes int64, of the same rank")
    for other, size in enumerate(where.shape):
        require(size <= part.shape[other], f"{where} is larger than {part}")
        require(other == at or size <= given.shape[other], f"{where} is larger than {given}")
    return given


@operator("scatter.value")
def _scatter_value(self: Any, dim: Any, index: Any, value: Any) -> TensorType:
    number(value)
    _gather(self, dim, index)
    return tensor(self)


@operator("scatter.reduce")
def _scatter_reduce(self: Any, dim: Any, index: Any, src: Any, *, reduce: Any) -> TensorType:
    one_of(reduce, ("add", "multiply"))
    return _scatter(self, dim, index, src)


@operator("masked_scatter")
def _masked_scatter(self: Any, mask: Any, source: Any) -> TensorType:
    given, where = tensor(self), tensor(mask)
    require(where.dtype == "bool", f"a mask is of bool, not of {where.dtype}")
    require(tensor(source).dtype == given.dtype, f"{source} is not scattered into {given}")
    return TensorType(given.dtype, broadcast(given.shape, where.shape))


def _indexed(self: Any, indices: Any) -> TensorType:
    """Returns the type of `self[indices]`: dimensions that are indexed become those of the indices."""
    given = tensor(self)
    require(isinstance(indices, tuple | list) and 0 < len(indices) <= len(given.shape), "an index for each dimension")
    indexed = [at for at, index in enumerate(indices) if index is not None]
    require(bool(indexed), "at least one dimension is indexed")
    shape = broadcast(*(_index(indices[at]).shape for at in indexed))
    rest = [size for at, size in enumerate(given.shape) if at not in indexed]
    together = indexed == list(range(indexed[0], indexed[-1] + 1))
    first = indexed[0] if together else 0
    return TensorType(given.dtype, (*rest[:first], *shape, *rest[first:]))


@operator("index.Tensor")
def _index_tensor(self: Any, indices: Any) -> TensorType:
    return _indexed(self, indices)


@operator("index_put")
def _index_put(self: Any, indices: Any, values: Any, accumulate: Any = False) -> TensorType:
    """Checks the operands. A mask selects an unknown number of elements, so values are repeated along it."""
    flag(accumulate)
    given, new = tensor(self), tensor(values)
    require(new.dtype == given.dtype, f"{new} is not put into {given}")
    require(isinstance(indices, tuple | list) and bool(indices), "an index for each dimension")
    first = next(iter(indices))
    if isinstance(first, TensorType) and first.dtype == "bool":
        rank = len(first.shape)
        require(len(indices) == 1 and given.shape[:rank] == first.shape, f"{first} is no mask of {given}")
        require(broadcast(new.shape, given.shape[rank:]) == given.shape[rank:], f"a mask does not put in {new}")
        return given
    whole = _indexed(given, indices).shape
    require(broadcast(whole, new.shape) == whole, f"{new} is not what {whole} takes")
    return given
