"""Torch's rules for the dtype of a result, over the dtypes' names.

Source: https://docs.pytorch.org/docs/stable/tensor_attributes.html#type-promotion-doc
"""

from __future__ import annotations

from collections.abc import Iterable

from diffkiln.program.ir import TensorType
from diffkiln.program.operators.table import Number, Refused

BOOL, INTEGER, FLOAT, COMPLEX = range(4)

_INTEGERS = ("int8", "int16", "int32", "int64")
_FLOATS = ("float16", "bfloat16", "float32", "float64")
_FLOAT8 = ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu")
#: The real dtype of a complex number's two parts.
REAL = {"complex64": "float32", "complex128": "float64"}
_COMPLEX_OF = {"float16": "complex64", "bfloat16": "complex64", "float32": "complex64", "float64": "complex128"}

#: Bytes of one element, for every dtype that a program may name.
SIZES: dict[str, int] = {
    "bool": 1, "uint8": 1, "int8": 1, "int16": 2, "int32": 4, "int64": 8, "float16": 2, "bfloat16": 2, "float32": 4,
    "float64": 8, "complex64": 8, "complex128": 16, **dict.fromkeys(_FLOAT8, 1),
}  # fmt: skip

_CATEGORY = {"bool": BOOL, "uint8": INTEGER} | dict.fromkeys(_INTEGERS, INTEGER)
_CATEGORY |= dict.fromkeys((*_FLOATS, *_FLOAT8), FLOAT) | dict.fromkeys(REAL, COMPLEX)

#: Dtype of a Python number: bool, int, float.
_DEFAULT = {BOOL: "bool", INTEGER: "int64", FLOAT: "float32", COMPLEX: "complex64"}


def category(dtype: str) -> int:
    """Returns whether a dtype is BOOL, INTEGER, FLOAT or COMPLEX."""
    return _CATEGORY[dtype]


def nbytes(type_: TensorType) -> int:
    """Returns the bytes of a dense tensor of this type."""
    return type_.numel * SIZES[type_.dtype]


def real_of(dtype: str) -> str:
    """Returns the dtype of a number's absolute value."""
    return REAL.get(dtype, dtype)


def floating(dtype: str) -> str:
    """Returns the dtype of a function such as `exp`: integers become float32."""
    return dtype if category(dtype) >= FLOAT else "float32"


def complex_of(dtype: str) -> str:
    """Returns the complex dtype that holds numbers of this dtype.

    Raises:
        Refused: there is none, as for the kinds of float8.
    """
    found = dtype if dtype in REAL else _COMPLEX_OF.get(floating(dtype))
    if found is None:
        raise Refused(f"no complex number has parts of {dtype}")
    return found


def summed(dtype: str) -> str:
    """Returns the dtype of a sum: integers and booleans become int64."""
    return dtype if category(dtype) >= FLOAT else "int64"


def promote(a: str, b: str) -> str:
    """Returns the smallest dtype that holds both.

    Raises:
        Refused: torch promotes neither to the other, which holds for the kinds of float8.
    """
    if a == b:
        return a
    if a in _FLOAT8 or b in _FLOAT8:
        raise Refused(f"{a} and {b} have no common dtype")
    low, high = sorted((a, b), key=category)
    if category(high) == COMPLEX:
        return _promote_complex(low, high)
    if category(low) < category(high):
        return high
    if category(low) == INTEGER:
        return _promote_integers(low, high)
    if {low, high} == {"float16", "bfloat16"}:
        return "float32"
    return max(low, high, key=_FLOATS.index)


def _promote_complex(low: str, high: str) -> str:
    double = "float64" in (low, REAL[high]) or low == "complex128"
    return "complex128" if double else "complex64"


def _promote_integers(a: str, b: str) -> str:
    if "uint8" not in (a, b):
        return max(a, b, key=_INTEGERS.index)
    other = b if a == "uint8" else a
    return "int16" if other == "int8" else other


def _number_dtype(value: bool | int | float | Number) -> str:
    if isinstance(value, bool):
        return "bool"
    return "int64" if isinstance(value, int) else "float32"


def result_dtype(operands: Iterable[TensorType | bool | int | float | Number]) -> str:
    """Returns the dtype of a pointwise operation on these operands.

    Tensors with dimensions come first; those without, and then Python numbers, count only if their category is higher.
    """
    dims, zeros, numbers = None, None, None
    for item in operands:
        if not isinstance(item, TensorType):
            numbers = _joined(numbers, _number_dtype(item))
        elif item.shape:
            dims = _joined(dims, item.dtype)
        else:
            zeros = _joined(zeros, item.dtype)
    return _combined(dims, _combined(zeros, numbers)) or "float32"


def _joined(a: str | None, b: str) -> str:
    return b if a is None else promote(a, b)


def _combined(higher: str | None, lower: str | None) -> str | None:
    if higher is None or lower is None:
        return higher or lower
    if category(higher) == COMPLEX:
        return higher
    if category(higher) == FLOAT:
        return complex_of(higher) if category(lower) == COMPLEX else higher
    if category(higher) == BOOL or category(lower) >= FLOAT:
        return promote(higher, lower)
    return higher
