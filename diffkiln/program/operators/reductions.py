"""Operators that reduce, accumulate, sort and search along dimensions."""

from __future__ import annotations

from typing import Any

from diffkiln.program.ir import DType, TensorType
from diffkiln.program.operators.promotion import SIZES, floating, real_of, summed
from diffkiln.program.operators.table import (
    axes,
    axis,
    flag,
    flags,
    integer,
    number,
    one_of,
    operator,
    require,
    tensor,
)


def dtype_or(dtype: Any, default: str) -> str:
    """Returns the dtype that an option names, or the default where it is absent."""
    if dtype is None:
        return default
    require(isinstance(dtype, DType) and dtype.name in SIZES, f"{dtype!r} is not a dtype of programs")
    return dtype.name


def reduced(given: TensorType, dim: Any, keepdim: Any, dtype: str) -> TensorType:
    """Returns the type of a reduction over some dimensions; None and an empty list stand for all."""
    flag(keepdim)
    rank = len(given.shape)
    chosen = range(rank) if dim is None or dim == () else axes(dim, rank)
    shape = []
    for at, size in enumerate(given.shape):
        if at not in chosen:
            shape.append(size)
        elif keepdim:
            shape.append(1)
    return TensorType(dtype, tuple(shape))


@operator("sum", "prod")
def _sum(self: Any, *, dtype: Any = None) -> TensorType:
    return TensorType(dtype_or(dtype, summed(tensor(self).dtype)), ())


@operator("sum.dim_IntList", "prod.dim_int")
def _sum_dim(self: Any, dim: Any, keepdim: Any = False, *, dtype: Any = None) -> TensorType:
    given = tensor(self)
    return reduced(given, dim, keepdim, dtype_or(dtype, summed(given.dtype)))


@operator("mean")
def _mean(self: Any, *, dtype: Any = None) -> TensorType:
    return TensorType(dtype_or(dtype, tensor(self).dtype), ())


@operator("mean.dim")
def _mean_dim(self: Any, dim: Any, keepdim: Any = False, *, dtype: Any = None) -> TensorType:
    given = tensor(self)
    return reduced(given, dim, keepdim, dtype_or(dtype, given.dtype))


@operator("amax", "amin")
def _extreme(self: Any, dim: Any = (), keepdim: Any = False) -> TensorType:
    given = tensor(self)
    return reduced(given, dim, keepdim, given.dtype)


@operator("max", "min", "median")
def _extreme_of_all(self: Any) -> TensorType:
    return TensorType(tensor(self).dtype, ())


@operator("max.dim", "min.dim", "median.dim")
def _extreme_and_index(self: Any, dim: Any, keepdim: Any = False) -> tuple[TensorType, TensorType]:
    given = tensor(self)
    at = axis(dim, len(given.shape))
    values = reduced(given, (at,), keepdim, given.dtype)
    return values, TensorType("int64", values.shape)


@operator("argmax", "argmin")
def _index(self: Any, dim: Any = None, keepdim: Any = False) -> TensorType:
    given = tensor(self)
    return reduced(given, None if dim is None else (axis(dim, len(given.shape)),), keepdim, "int64")


def _truth_dtype(given: TensorType) -> str:
    return "uint8" if given.dtype == "uint8" else "bool"


@operator("any", "all")
def _truth(self: Any) -> TensorType:
    return TensorType(_truth_dtype(tensor(self)), ())


@operator("any.dim", "all.dim")
def _truth_dim(self: Any, dim: Any, keepdim: Any = False) -> TensorType:
    given = tensor(self)
    return reduced(given, (axis(dim, len(given.shape)),), keepdim, _truth_dtype(given))


@operator("any.dims", "all.dims")
def _truth_dims(self: Any, dim: Any = None, keepdim: Any = False) -> TensorType:
    given = tensor(self)
    require(dim != (), "an empty list of dimensions has no one meaning")
    return reduced(given, dim, keepdim, _truth_dtype(given))


@operator("count_nonzero")
def _count(self: Any, dim: Any = None) -> TensorType:
    given = tensor(self)
    return reduced(given, None if dim is None else (axis(dim, len(given.shape)),), False, "int64")


@operator("count_nonzero.dim_IntList")
def _count_dims(self: Any, dim: Any) -> TensorType:
    return reduced(tensor(self), dim, False, "int64")


# -- spreads and norms --


def _spread(self: Any, dim: Any, keepdim: Any) -> TensorType:
    given = tensor(self)
    return reduced(given, dim, keepdim, real_of(given.dtype))


@operator("var", "std")
def _var(self: Any, unbiased: Any = True) -> TensorType:
    flag(unbiased)
    return _spread(self, None, False)


@operator("var.dim", "std.dim")
def _var_dim(self: Any, dim: Any, unbiased: Any = True, keepdim: Any = False) -> TensorType:
    flag(unbiased)
    return _spread(self, dim, keepdim)


@operator("var.correction", "std.correction")
def _var_correction(self: Any, dim: Any = None, *, correction: Any = None, keepdim: Any = False) -> TensorType:
    require(correction is None or isinstance(correction, int | float), f"{correction!r} is not a correction")
    return _spread(self, dim, keepdim)


@operator("var_mean.correction", "std_mean.correction")
def _var_mean(self: Any, dim: Any = None, *, correction: Any = None, keepdim: Any = False) -> list[TensorType]:
    spread = _var_correction(self, dim, correction=correction, keepdim=keepdim)
    return [spread, TensorType(tensor(self).dtype, spread.shape)]


@operator("linalg_vector_norm")
def _vector_norm(self: Any, ord: Any = 2, dim: Any = None, keepdim: Any = False, *, dtype: Any = None) -> TensorType:
    number(ord)
    given = tensor(self)
    return reduced(given, dim, keepdim, real_of(dtype_or(dtype, given.dtype)))


@operator("linalg_norm")
def _linalg_norm(self: Any, ord: Any = None, dim: Any = None, keepdim: Any = False, *, dtype: Any = None) -> TensorType:
    """Refuses norms of matrices other than Frobenius', which need a decomposition whose time is hard to bound."""
    given = tensor(self)
    rank = len(given.shape) if dim is None else len(axes(dim, len(given.shape)))
    require(ord is None or rank == 1, "a norm of matrices has no order")
    if ord is not None:
        number(ord)
    return reduced(given, dim, keepdim, real_of(dtype_or(dtype, given.dtype)))


@operator("norm.Scalar")
def _norm(self: Any, p: Any = 2) -> TensorType:
    return _vector_norm(self, p)


@operator("norm.ScalarOpt_dim")
def _norm_dim(self: Any, p: Any, dim: Any, keepdim: Any = False) -> TensorType:
    return _vector_norm(self, 2 if p is None else p, dim, keepdim)


@operator("logsumexp")
def _logsumexp(self: Any, dim: Any, keepdim: Any = False) -> TensorType:
    given = tensor(self)
    return reduced(given, dim, keepdim, floating(given.dtype))


@operator("cosine_similarity")
def _cosine_similarity(x1: Any, x2: Any, dim: Any = 1, eps: Any = 1e-8) -> TensorType:
    number(eps)
    a, b = tensor(x1), tensor(x2)
    require(a == b, "cosine_similarity takes two tensors of one type")
    return reduced(a, (axis(dim, len(a.shape)),), False, a.dtype)


# -- along a dimension --


@operator("cumsum", "cumprod")
def _accumulated(self: Any, dim: Any, *, dtype: Any = None) -> TensorType:
    given = tensor(self)
    axis(dim, len(given.shape))
    return TensorType(dtype_or(dtype, summed(given.dtype)), given.shape)


@operator("softmax.int", "log_softmax.int")
def _softmax(self: Any, dim: Any, dtype: Any = None) -> TensorType:
    given = tensor(self)
    axis(dim, len(given.shape))
    return TensorType(dtype_or(dtype, given.dtype), given.shape)


@operator("_softmax")
def _softmax_core(self: Any, dim: Any, half_to_float: Any) -> TensorType:
    require(half_to_float is False, "half_to_float is for GPUs alone")
    return _softmax(self, dim)


@operator("argsort")
def _argsort(self: Any, dim: Any = -1, descending: Any = False) -> TensorType:
    flag(descending)
    given = tensor(self)
    axis(dim, len(given.shape))
    return TensorType("int64", given.shape)


@operator("argsort.stable")
def _argsort_stable(self: Any, *, stable: Any, dim: Any = -1, descending: Any = False) -> TensorType:
    flag(stable)
    return _argsort(self, dim, descending)


@operator("sort")
def _sort(self: Any, dim: Any = -1, descending: Any = False) -> list[TensorType]:
    return [tensor(self), _argsort(self, dim, descending)]


@operator("sort.stable")
def _sort_stable(self: Any, *, stable: Any, dim: Any = -1, descending: Any = False) -> list[TensorType]:
    require(stable is None or isinstance(stable, bool), f"{stable!r} is neither true nor false")
    return _sort(self, dim, descending)


@operator("topk")
def _topk(self: Any, k: Any, dim: Any = -1, largest: Any = True, sorted: Any = True) -> list[TensorType]:
    flags(largest, sorted)
    given = tensor(self)
    at = axis(dim, len(given.shape))
    if given.shape:
        count = integer(k, 0, given.shape[at])
        given = TensorType(given.dtype, (*given.shape[:at], count, *given.shape[at + 1 :]))
    else:
        integer(k, 1, 1)
    return [given, TensorType("int64", given.shape)]


@operator("quantile.scalar")
def _quantile(self: Any, q: Any, dim: Any = None, keepdim: Any = False, *, interpolation: Any = "linear") -> TensorType:
    one_of(interpolation, ("linear", "lower", "higher", "nearest", "midpoint"))
    require(isinstance(q, int | float) and 0 <= q <= 1, f"{q!r} is not between 0 and 1")
    given = tensor(self)
    require(given.dtype in ("float32", "float64") and given.numel > 0, f"{given} has no quantiles")
    return reduced(given, None if dim is None else (axis(dim, len(given.shape)),), keepdim, given.dtype)


@operator("searchsorted.Tensor")
def _searchsorted(
    sorted_sequence: Any, self: Any, *, out_int32: Any = False, right: Any = False, side: Any = None
) -> TensorType:
    """Refuses a `sorter`, since it is an index that torch follows."""
    flag(right)
    one_of(side, (None, "left", "right"))
    ordered, values = tensor(sorted_sequence), tensor(self)
    require(len(ordered.shape) == 1 or ordered.shape[:-1] == values.shape[:-1], "one sorted sequence, or one a row")
    return TensorType("int32" if flag(out_int32) else "int64", values.shape)


@operator("bucketize.Tensor")
def _bucketize(self: Any, boundaries: Any, *, out_int32: Any = False, right: Any = False) -> TensorType:
    require(len(tensor(boundaries).shape) == 1, "bucketize takes boundaries in one dimension")
    return _searchsorted(boundaries, self, out_int32=out_int32, right=right)
