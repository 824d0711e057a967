"""Products of matrices, linear layers and attention."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from diffkiln.program.ir import DType, TensorType
from diffkiln.program.operators.promotion import floating, promote, real_of
from diffkiln.program.operators.table import (
    broadcast,
    flag,
    number,
    numbers,
    one_of,
    operator,
    require,
    tensor,
    tensors,
)


def _one_dtype(*operands: TensorType) -> str:
    dtypes = {item.dtype for item in operands}
    require(len(dtypes) == 1, f"a product takes one dtype, not {' and '.join(sorted(dtypes))}")
    return operands[0].dtype


def _matrices(a: TensorType, b: TensorType, rank: int) -> tuple[int, ...]:
    require(len(a.shape) == len(b.shape) == rank, f"{a} and {b} have not {rank} dimensions")
    require(a.shape[:-2] == b.shape[:-2] and a.shape[-1] == b.shape[-2], f"{a} and {b} have no product")
    return (*a.shape[:-1], b.shape[-1])


@operator("mm")
def _mm(self: Any, mat2: Any) -> TensorType:
    a, b = tensor(self), tensor(mat2)
    return TensorType(_one_dtype(a, b), _matrices(a, b, 2))


@operator("bmm")
def _bmm(self: Any, mat2: Any) -> TensorType:
    a, b = tensor(self), tensor(mat2)
    return TensorType(_one_dtype(a, b), _matrices(a, b, 3))


@operator("matmul")
def _matmul(self: Any, other: Any) -> TensorType:
    a, b = tensor(self), tensor(other)
    require(bool(a.shape) and bool(b.shape), "a product takes tensors with dimensions")
    left = a.shape if len(a.shape) > 1 else (1, *a.shape)
    right = b.shape if len(b.shape) > 1 else (*b.shape, 1)
    require(left[-1] == right[-2], f"{a} and {b} have no product")
    shape = [*broadcast(left[:-2], right[:-2])]
    if len(a.shape) > 1:
        shape.append(left[-2])
    if len(b.shape) > 1:
        shape.append(right[-1])
    return TensorType(_one_dtype(a, b), tuple(shape))


@operator("mv")
def _mv(self: Any, vec: Any) -> TensorType:
    require(len(tensor(self).shape) == 2 and len(tensor(vec).shape) == 1, "mv takes a matrix and a vector")
    return _matmul(self, vec)


@operator("dot")
def _dot(self: Any, tensor: Any) -> TensorType:
    a, b = self, tensor
    require(isinstance(a, TensorType) and isinstance(b, TensorType), "dot takes two vectors")
    require(len(a.shape) == len(b.shape) == 1, "dot takes two vectors")
    return _matmul(a, b)


@operator("outer")
def _outer(self: Any, vec2: Any) -> TensorType:
    a, b = tensor(self), tensor(vec2)
    require(len(a.shape) == len(b.shape) == 1, "outer takes two vectors")
    return TensorType(promote(a.dtype, b.dtype), (*a.shape, *b.shape))


def _added(bias: Any, product: TensorType) -> TensorType:
    given = tensor(bias)
    _one_dtype(given, product)
    require(broadcast(given.shape, product.shape) == product.shape, f"{given} is not added to {product}")
    return product


@operator("addmm")
def _addmm(self: Any, mat1: Any, mat2: Any, *, beta: Any = 1, alpha: Any = 1) -> TensorType:
    numbers(beta, alpha)
    return _added(self, _mm(mat1, mat2))


@operator("baddbmm")
def _baddbmm(self: Any, batch1: Any, batch2: Any, *, beta: Any = 1, alpha: Any = 1) -> TensorType:
    numbers(beta, alpha)
    return _added(self, _bmm(batch1, batch2))


@operator("addmv")
def _addmv(self: Any, mat: Any, vec: Any, *, beta: Any = 1, alpha: Any = 1) -> TensorType:
    numbers(beta, alpha)
    return _added(self, _mv(mat, vec))


@operator("linear")
def _linear(input: Any, weight: Any, bias: Any = None) -> TensorType:
    given, matrix = tensor(input), tensor(weight)
    require(bool(given.shape) and len(matrix.shape) in (1, 2), "linear takes a matrix")
    require(given.shape[-1] == matrix.shape[-1], f"{given} and {matrix} have no product")
    result = TensorType(_one_dtype(given, matrix), (*given.shape[:-1], *matrix.shape[:-1]))
    if bias is not None:
        require(tensor(bias).shape in (matrix.shape[:-1], ()), f"{bias} is not a bias of {matrix}")
        _one_dtype(tensor(bias), given)
    return result


@operator("_int_mm")
def _int_mm(self: Any, mat2: Any) -> TensorType:
    a, b = tensor(self), tensor(mat2)
    require(a.dtype in ("int8", "uint8") and b.dtype == "int8", f"_int_mm takes int8, not {a} and {b}")
    return TensorType("int32", _matrices(a, b, 2))


@operator("_weight_int8pack_mm")
def _int8_weight(self: Any, mat2: Any, scales: Any) -> TensorType:
    a, b, scale = tensor(self), tensor(mat2), tensor(scales)
    require(b.dtype == "int8" and a.dtype in ("float32", "float16", "bfloat16"), "int8 weights and float activations")
    require(len(a.shape) == len(b.shape) == 2 and a.shape[1] == b.shape[1], f"{a} and {b} have no product")
    require(scale == TensorType(a.dtype, b.shape[:1]), "_weight_int8pack_mm takes a scale a row")
    return TensorType(a.dtype, (a.shape[0], b.shape[0]))


@operator("_scaled_mm")
def _scaled_mm(
    self: Any,
    mat2: Any,
    scale_a: Any,
    scale_b: Any,
    bias: Any = None,
    scale_result: Any = None,
    out_dtype: Any = None,
    use_fast_accum: Any = False,
) -> TensorType:
    flag(use_fast_accum)
    a, b = tensor(self), tensor(mat2)
    require(scale_result is None, "scale_result is not taken")
    require(a.dtype.startswith("float8") and b.dtype.startswith("float8"), "_scaled_mm takes float8")
    shape = _matrices(a, b, 2)
    for scale, whole in ((tensor(scale_a), (shape[0], 1)), (tensor(scale_b), (1, shape[1]))):
        require(scale.dtype == "float32", "scales are float32")
        require(scale.numel == 1 or scale.shape == whole, f"{scale} is neither one scale nor one a row")
    if bias is not None:
        require(tensor(bias).shape == shape[1:], f"{bias} is not a bias of {shape}")
    if out_dtype is None:
        return TensorType(a.dtype, shape)
    require(isinstance(out_dtype, DType), f"{out_dtype!r} is not a dtype")
    return TensorType(one_of(out_dtype.name, ("float32", "float16", "bfloat16")), shape)


@operator("cdist")
def _cdist(x1: Any, x2: Any, p: Any = 2.0, compute_mode: Any = None) -> TensorType:
    number(p)
    one_of(compute_mode, (None, 0, 1, 2))
    a, b = tensor(x1), tensor(x2)
    require(len(a.shape) >= 2 and len(b.shape) >= 2 and a.shape[-1] == b.shape[-1], f"{a} and {b} are no points")
    batch = broadcast(a.shape[:-2], b.shape[:-2])
    return TensorType(_one_dtype(a, b), (*batch, *a.shape[-2:-1], *b.shape[-2:-1]))


@operator("linalg_qr")
def _qr(A: Any, mode: Any = "reduced") -> list[TensorType]:
    given = tensor(A)
    require(len(given.shape) >= 2, "a matrix has two dimensions")
    one_of(mode, ("reduced", "complete"))
    batch, (rows, columns) = given.shape[:-2], given.shape[-2:]
    inner = min(rows, columns) if mode == "reduced" else rows
    return [TensorType(given.dtype, (*batch, rows, inner)), TensorType(given.dtype, (*batch, inner, columns))]


# -- einsum --

_TERM = re.compile(r"[a-zA-Z]*(?:\.\.\.[a-zA-Z]*)?", re.ASCII)


@operator("einsum")
def _einsum(equation: Any, tensors: Any, *, path: Any = None) -> TensorType:
    require(isinstance(equation, str), f"{equation!r} is not an equation")
    require(path is None, "einsum takes no path")
    operands = _operands(tensors)
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    require(len(terms) == len(operands), f"{equation!r} is not for {len(operands)} tensors")
    sizes: dict[str, int] = {}
    rests: list[Sequence[int]] = []
    for term, operand in zip(terms, operands, strict=True):
        rests.append(_labelled(term, operand, sizes))
    right = right if arrow else _implicit(left)
    require(_TERM.fullmatch(right) is not None, f"{right!r} is not a term of an equation")
    shape: list[int] = []
    for part in re.findall(r"\.\.\.|[a-zA-Z]", right):
        require(part == "..." or part in sizes, f"{part!r} is on the right of {equation!r} alone")
        shape += broadcast(*rests) if part == "..." else [sizes[part]]
    letters = right.replace("...", "")
    require(len(set(letters)) == len(letters), f"{equation!r} has a letter twice on the right")
    return TensorType(_one_dtype(*operands), tuple(shape))


def _operands(values: Any) -> list[TensorType]:
    return tensors(values)


def _labelled(term: str, operand: TensorType, sizes: dict[str, int]) -> Sequence[int]:
    """Notes the size of each letter, and returns the sizes that the dots stand for."""
    require(_TERM.fullmatch(term) is not None, f"{term!r} is not a term of an equation")
    first, dots, last = term.partition("...")
    rest = len(operand.shape) - len(first) - len(last)
    require(rest >= 0 and (rest == 0 or dots != ""), f"{term!r} is not for {operand}")
    letters = [*first, *["."] * rest, *last]
    for letter, size in zip(letters, operand.shape, strict=True):
        if letter != "." and size != 1:
            require(sizes.get(letter, 1) in (1, size), f"the sizes of {letter!r} differ")
            sizes[letter] = size
        elif letter != ".":
            sizes.setdefault(letter, 1)
    return operand.shape[len(first) : len(first) + rest]


def _implicit(left: str) -> str:
    letters = sorted(set(left) - {",", "."})
    once = "".join(letter for letter in letters if left.count(letter) == 1)
    return ("..." if "..." in left else "") + once


# -- attention --


def attended(query: TensorType, key: TensorType, value: TensorType, grouped: bool = False) -> TensorType:
    """Returns the type of attention over [..., heads, tokens, channels].

    Args:
        grouped: True if several heads of the query share one of the keys.
    """
    require(min(len(query.shape), len(key.shape), len(value.shape)) >= 2, "attention takes tokens and channels")
    require(query.shape[-1] == key.shape[-1] and key.shape[-2] == value.shape[-2], "queries, keys and values fit")
    lead = query.shape[:-2]
    if grouped:
        require(len(query.shape) == len(key.shape) == len(value.shape) >= 3, "grouped attention has heads")
        require(key.shape[:-2] == value.shape[:-2] and key.shape[-3] > 0, "keys and values have one number of heads")
        require(query.shape[-3] % key.shape[-3] == 0, "heads of the query divide among those of the keys")
        require(query.shape[:-3] == key.shape[:-3], "queries and keys have one batch")
    else:
        lead = broadcast(lead, key.shape[:-2], value.shape[:-2])
    return TensorType(_one_dtype(query, key, value), (*lead, query.shape[-2], value.shape[-1]))


@operator("scaled_dot_product_attention")
def _attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: Any = 0.0,
    is_causal: Any = False,
    *,
    scale: Any = None,
    enable_gqa: Any = False,
) -> TensorType:
    require(dropout_p == 0, "attention drops nothing")
    flag(is_causal)
    require(scale is None or isinstance(scale, int | float), f"{scale!r} is no scale")
    result = attended(tensor(query), tensor(key), tensor(value), flag(enable_gqa))
    require(result.dtype == floating(real_of(result.dtype)), "attention takes floats")
    if attn_mask is not None:
        mask, whole = tensor(attn_mask), (*result.shape[:-1], tensor(key).shape[-2])
        require(not is_causal, "attention is causal or takes a mask")
        require(mask.dtype in ("bool", result.dtype, "float32"), f"{mask} is no mask of {result}")
        require(len(mask.shape) >= 2 and broadcast(mask.shape, whole) == whole, f"{mask} is no mask of {whole}")
    return result
