"""Operators that compute each element by itself, and comparisons."""

from __future__ import annotations

from typing import Any

from diffkiln.program.ir import TensorType
from diffkiln.program.operators.promotion import complex_of, floating, promote, real_of, result_dtype
from diffkiln.program.operators.table import (
    Number,
    broadcast,
    entries,
    integer,
    number,
    numbers,
    one_of,
    operator,
    require,
    tensor,
)


def _shape(*operands: Any) -> tuple[int, ...]:
    return broadcast(*(item.shape for item in operands if isinstance(item, TensorType)))


def _operand(value: Any) -> TensorType | bool | int | float | Number:
    return value if isinstance(value, TensorType) else number(value)


def _joined(*operands: Any) -> TensorType:
    """Returns the type of a pointwise result whose dtype is the operands' common one."""
    given = [_operand(item) for item in operands]
    return TensorType(result_dtype(given), _shape(*given))


# -- of one tensor --


def _same(self: Any) -> TensorType:
    return tensor(self)


def _floating(self: Any) -> TensorType:
    given = tensor(self)
    return TensorType(floating(given.dtype), given.shape)


def _truth(self: Any) -> TensorType:
    return TensorType("bool", tensor(self).shape)


entries("neg floor ceil trunc frac sign relu relu6 silu mish hardswish hardsigmoid selu log_sigmoid", _same)
entries("conj_physical bitwise_not round", _same)
entries("exp exp2 expm1 special_expm1 log log2 log10 log1p sqrt rsqrt reciprocal sin cos tan tanh asin acos", _floating)
entries("atan rad2deg deg2rad sigmoid erf", _floating)
entries("isnan isinf isfinite logical_not", _truth)


@operator("abs")
def _abs(self: Any) -> TensorType:
    given = tensor(self)
    return TensorType(real_of(given.dtype), given.shape)


@operator("square")
def _square(self: Any) -> TensorType:
    given = tensor(self)
    return TensorType("int64" if given.dtype == "bool" else given.dtype, given.shape)


@operator("round.decimals")
def _round(self: Any, *, decimals: Any) -> TensorType:
    integer(decimals, -30, 30)
    return tensor(self)


@operator("gelu")
def _gelu(self: Any, *, approximate: Any = "none") -> TensorType:
    one_of(approximate, ("none", "tanh"))
    return tensor(self)


@operator("elu")
def _elu(self: Any, alpha: Any = 1, scale: Any = 1, input_scale: Any = 1) -> TensorType:
    for value in (alpha, scale, input_scale):
        number(value)
    return tensor(self)


@operator("softplus")
def _softplus(self: Any, beta: Any = 1, threshold: Any = 20) -> TensorType:
    numbers(beta, threshold)
    return tensor(self)


@operator("leaky_relu", "celu")
def _sloped(self: Any, negative_slope: Any = 0.01, *, alpha: Any = 1.0) -> TensorType:
    numbers(negative_slope, alpha)
    return tensor(self)


@operator("hardtanh")
def _hardtanh(self: Any, min_val: Any = -1, max_val: Any = 1) -> TensorType:
    numbers(min_val, max_val)
    return tensor(self)


@operator("threshold")
def _threshold(self: Any, threshold: Any, value: Any) -> TensorType:
    numbers(threshold, value)
    return tensor(self)


@operator("nan_to_num")
def _nan_to_num(self: Any, nan: Any = None, posinf: Any = None, neginf: Any = None) -> TensorType:
    for value in (nan, posinf, neginf):
        require(value is None or isinstance(value, int | float), f"{value!r} is not a number")
    return tensor(self)


@operator("prelu")
def _prelu(self: Any, weight: Any) -> TensorType:
    given, slope = tensor(self), tensor(weight)
    require(given.dtype == slope.dtype, "prelu takes a slope of its input's dtype")
    if slope.numel != 1:
        require(len(given.shape) > 1 and slope.shape == given.shape[1:2], "prelu takes one slope, or one a channel")
    return given


@operator("glu")
def _glu(self: Any, dim: Any = -1) -> TensorType:
    given = tensor(self)
    at = integer(dim, -len(given.shape), len(given.shape) - 1) % max(len(given.shape), 1)
    require(given.shape[at] % 2 == 0, "glu halves an even size")
    return TensorType(given.dtype, (*given.shape[:at], given.shape[at] // 2, *given.shape[at + 1 :]))


# -- of two and three --


@operator("add.Tensor", "sub.Tensor", "rsub.Tensor", "add.Scalar", "sub.Scalar", "rsub.Scalar")
def _sum(self: Any, other: Any, alpha: Any = 1) -> TensorType:
    number(alpha)
    tensor(self)
    return _joined(self, other)


def _product(self: Any, other: Any) -> TensorType:
    tensor(self)
    return _joined(self, other)


entries("mul.Tensor mul.Scalar maximum minimum fmax fmin max.other min.other", _product)
entries("bitwise_and.Tensor bitwise_or.Tensor bitwise_xor.Tensor bitwise_left_shift.Tensor", _product)
entries("bitwise_right_shift.Tensor bitwise_and.Scalar bitwise_or.Scalar bitwise_xor.Scalar", _product)
entries("bitwise_left_shift.Tensor_Scalar bitwise_right_shift.Tensor_Scalar", _product)
entries("__and__.Tensor __or__.Tensor __xor__.Tensor __and__.Scalar __or__.Scalar __xor__.Scalar", _product)
entries("__lshift__.Tensor __rshift__.Tensor __lshift__.Scalar __rshift__.Scalar", _product)


@operator("floor_divide", "floor_divide.Scalar")
@operator("fmod.Tensor", "fmod.Scalar", "remainder.Tensor", "remainder.Scalar")
def _floor_divide(self: Any, other: Any) -> TensorType:
    require(tensor(self).dtype != "bool", "booleans have no quotient")
    return _product(self, other)


@operator("div.Tensor", "div.Scalar", "true_divide.Tensor", "true_divide.Scalar", "atan2")
def _quotient(self: Any, other: Any) -> TensorType:
    joined = _product(self, other)
    return TensorType(floating(joined.dtype), joined.shape)


@operator("div.Tensor_mode", "div.Scalar_mode")
def _rounded_quotient(self: Any, other: Any, *, rounding_mode: Any) -> TensorType:
    one_of(rounding_mode, (None, "trunc", "floor"))
    return _quotient(self, other) if rounding_mode is None else _floor_divide(self, other)


@operator("pow.Tensor_Tensor", "pow.Tensor_Scalar")
def _power(self: Any, exponent: Any) -> TensorType:
    tensor(self)
    return _joined(self, exponent)


@operator("pow.Scalar")
def _power_of_number(self: Any, exponent: Any) -> TensorType:
    number(self)
    tensor(exponent)
    return _joined(self, exponent)


@operator("logaddexp")
def _logaddexp(self: Any, other: Any) -> TensorType:
    return _product(self, tensor(other))


def _comparison(self: Any, other: Any) -> TensorType:
    tensor(self)
    return TensorType("bool", _shape(self, _operand(other)))


for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    entries(f"{_name}.Tensor {_name}.Scalar", _comparison)
entries("logical_and logical_or logical_xor", _comparison)


@operator("clamp", "clamp.Tensor")
def _clamp(self: Any, min: Any = None, max: Any = None) -> TensorType:
    require(min is not None or max is not None, "clamp takes a limit")
    return _joined(tensor(self), *(limit for limit in (min, max) if limit is not None))


@operator("clamp_min", "clamp_min.Tensor")
def _clamp_min(self: Any, min: Any) -> TensorType:
    return _clamp(self, min)


@operator("clamp_max", "clamp_max.Tensor")
def _clamp_max(self: Any, max: Any) -> TensorType:
    return _clamp(self, None, max)


@operator("lerp.Scalar", "lerp.Tensor")
def _lerp(self: Any, end: Any, weight: Any) -> TensorType:
    given = tensor(self)
    return TensorType(given.dtype, _shape(given, tensor(end), _operand(weight)))


@operator("addcmul", "addcdiv")
def _addc(self: Any, tensor1: Any, tensor2: Any, *, value: Any = 1) -> TensorType:
    number(value)
    return _joined(tensor(self), tensor(tensor1), tensor(tensor2))


@operator("where.self", "where.ScalarOther", "where.ScalarSelf", "where.Scalar")
def _where(condition: Any, self: Any, other: Any) -> TensorType:
    given = tensor(condition)
    require(given.dtype == "bool", f"where takes a condition of booleans, not of {given.dtype}")
    joined = _joined(self, other)
    return TensorType(joined.dtype, broadcast(given.shape, joined.shape))


@operator("masked_fill.Scalar", "masked_fill.Tensor")
def _masked_fill(self: Any, mask: Any, value: Any) -> TensorType:
    given, where = tensor(self), tensor(mask)
    require(where.dtype == "bool", f"masked_fill takes a mask of booleans, not of {where.dtype}")
    if isinstance(value, TensorType):
        require(value.shape == (), "masked_fill takes a value without dimensions")
    else:
        number(value)
    return TensorType(given.dtype, broadcast(given.shape, where.shape))


# -- complex numbers --


@operator("complex")
def _complex(real: Any, imag: Any) -> TensorType:
    a, b = tensor(real), tensor(imag)
    require(a.dtype == b.dtype, "the real and imaginary parts have one dtype")
    require(a.dtype in ("float32", "float64"), f"{a.dtype} is not a part of a complex number")
    return TensorType(complex_of(a.dtype), broadcast(a.shape, b.shape))


@operator("polar")
def _polar(abs: Any, angle: Any) -> TensorType:
    return _complex(abs, angle)


@operator("real", "imag", view=True)
def _part(self: Any) -> TensorType:
    given = tensor(self)
    return TensorType(real_of(given.dtype), given.shape)


@operator("view_as_real", view=True)
def _view_as_real(self: Any) -> TensorType:
    given = tensor(self)
    require(given.dtype in ("complex64", "complex128"), f"{given.dtype} is not complex")
    return TensorType(real_of(given.dtype), (*given.shape, 2))


@operator("view_as_complex", view=True)
def _view_as_complex(self: Any) -> TensorType:
    given = tensor(self)
    require(given.shape[-1:] == (2,), "view_as_complex takes pairs along the last dimension")
    require(given.dtype in ("float32", "float64"), f"{given.dtype} is not a part of a complex number")
    return TensorType(complex_of(given.dtype), given.shape[:-1])


# -- dtypes --


@operator("type_as")
def _type_as(self: Any, other: Any) -> TensorType:
    return TensorType(tensor(other).dtype, tensor(self).shape)


@operator("cross")
def _cross(self: Any, other: Any, dim: Any = None) -> TensorType:
    a, b = tensor(self), tensor(other)
    shape = broadcast(a.shape, b.shape)
    dimensions = range(len(shape)) if dim is None else [integer(dim, -len(shape), len(shape) - 1)]
    require(any(shape[at] == 3 for at in dimensions), "cross takes a dimension of size 3")
    return TensorType(promote(a.dtype, b.dtype), shape)


@operator("linalg_cross")
def _linalg_cross(self: Any, other: Any, *, dim: Any = -1) -> TensorType:
    return _cross(self, other, dim)
