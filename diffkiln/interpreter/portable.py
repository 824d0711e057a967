"""Arithmetic on constants that gives the same bits on every x86-64 machine.

A program holds what does not depend on the request as constants: timesteps, sigmas, positions, rotary tables. torch and
NumPy compute sines, powers and sums with the instructions that a CPU has, and their last bits differ from CPU to CPU.
So would the bundle's id. Here such an operation is done in a wider type and rounded once: float32 and narrower types in
float64, float64 in the extended precision of x87. A difference in the wider type's last bits is lost in the rounding,
except where a value lies within that difference of the middle between two neighbours: about once in 10⁸ for float32,
once in 10³ for float64. Operations that IEEE 754 defines to the bit are left as they are.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _get_current_dispatch_mode_stack,
    is_traceable_wrapper_subclass,
)

from diffkiln.interpreter.nests import tensors_in

_WIDER = {
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.float32: torch.float64,
    torch.complex64: torch.complex128,
}

#: Operators of one rounding, or of none: IEEE 754 defines their result. What gives a view needs no name here. A square
#: root is not among them: torch takes it from MKL, whose last bit follows the CPU.
_EXACT_NAMES = """
    abs add amax amin cat ceil clamp clamp_max clamp_min clone complex constant_pad_nd copy copysign cummax
    cummin div embedding empty empty_like empty_permuted empty_strided eye fill floor flip fmod full full_like
    gather index index_fill index_put index_select item lift_fresh_copy masked_fill masked_scatter masked_select
    max maximum min minimum mul nan_to_num neg new_empty new_empty_strided new_full new_ones new_zeros nextafter
    ones ones_like pad pixel_shuffle pixel_unshuffle reciprocal relu repeat repeat_interleave resize roll rot90
    round rsub scalar_tensor scatter select_scatter set sgn sign slice_scatter sort stack sub take
    take_along_dim threshold tile to topk tril triu trunc where zero zeros zeros_like _local_scalar_dense
    _to_copy
"""
_EXACT = frozenset(_EXACT_NAMES.split())
#: Those of them that are products and sums where the numbers are complex: some CPUs round both together.
_OF_COMPLEX = frozenset({"abs", "div", "mul", "reciprocal", "sgn"})
#: Exponents for which torch takes no logarithm, and rounds once.
_PLAIN_POWERS = (0, 1, 2)

#: What float64 is computed by in extended precision.
_EXTENDED: Mapping[str, Callable[..., Any]] = {
    "acos": np.arccos,
    "asin": np.arcsin,
    "atan": np.arctan,
    "cos": np.cos,
    "cosh": np.cosh,
    "exp": np.exp,
    "exp2": np.exp2,
    "expm1": np.expm1,
    "log": np.log,
    "log10": np.log10,
    "log1p": np.log1p,
    "log2": np.log2,
    "pow": np.power,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "sin": np.sin,
    "sinh": np.sinh,
    "sqrt": np.sqrt,
    "tan": np.tan,
    "tanh": np.tanh,
}
#: The functions of NumPy that schedulers call. `x ** y` of arrays has no name to put another function under: float64
#: then differs in its last bit, which the cast to float32 that follows takes away.
_NUMPY = ("cos", "exp", "exp2", "expm1", "log", "log10", "log1p", "log2", "power", "sin", "tan", "tanh")


@contextmanager
def portable() -> Iterator[None]:
    """Makes torch and NumPy give the same bits on every machine, for plain CPU tensors, inside the `with` block."""
    if any(isinstance(mode, _Portable) for mode in _get_current_dispatch_mode_stack()):
        yield
        return
    with portable_numpy(), _Portable():
        yield


@contextmanager
def portable_numpy() -> Iterator[None]:
    """Makes NumPy's functions give the same bits on every machine, inside the `with` block; torch's are left alone."""
    with ExitStack() as stack:
        for name in _NUMPY:
            function = getattr(np, name)
            if isinstance(function, np.ufunc):
                stack.enter_context(mock.patch.object(np, name, _InExtended(function)))
        yield


def evaluate(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Calls an operator and gives what it gives on every machine.

    Only what ATen computes of plain tensors on the CPU is done so; all else is called as it is.
    """
    if not _may_differ(func) or not _is_inexact(func, args, kwargs) or not _plain((args, dict(kwargs))):
        return func(*args, **kwargs)
    _now.evaluating = True
    try:
        return _evaluated(func, args, kwargs)
    finally:
        _now.evaluating = False


def _evaluated(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    wide_args, wide_kwargs = _widened(args), _widened(dict(kwargs))  # before the call, which may write to them
    result = func(*args, **kwargs)
    floating = [tensor for tensor in tensors_in(result) if tensor.is_floating_point() or tensor.is_complex()]
    if not floating or not _plain(floating) or _gives_views(func, result, args):
        return result
    if floating[0].dtype in _WIDER:
        if not any(True for _ in tensors_in((args, dict(kwargs)))):
            wide_kwargs["dtype"] = _WIDER[floating[0].dtype]
        _copy(result, _attempt(func, wide_args, wide_kwargs))
    elif floating[0].dtype == torch.float64:
        _copy(result, _extended(_name(func), wide_args))
    return result


class _Portable(TorchDispatchMode):
    """A mode that evaluates every operator portably."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if any(is_traceable_wrapper_subclass(tensor) for tensor in tensors_in((args, kwargs))):
            return NotImplemented
        return func(*args, **kwargs) if _now.evaluating else evaluate(func, args, kwargs)


class _Now(threading.local):
    """The state of this thread: whether it evaluates an operator for a mode, so that no outer mode does so again."""

    evaluating = False


_now = _Now()


class _InExtended:
    """A function of NumPy that computes in extended precision and rounds once."""

    def __init__(self, function: np.ufunc) -> None:
        self._function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        native = self._function(*args, **kwargs)
        kind = getattr(native, "dtype", None)
        if kwargs or kind not in (np.float16, np.float32, np.float64):
            return native
        with np.errstate(all="ignore"):  # what there is to say was said of the native result
            wide = self._function(*(np.asarray(arg, np.longdouble) for arg in args))
        return wide.astype(kind)[()]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._function, name)


def _name(func: Any) -> str:
    return func._opname.removesuffix("_")


@functools.cache
def _may_differ(func: Any) -> bool:
    """Returns True if an operator computes something; one that gives a view, or draws random numbers, does not."""
    views = any(argument.alias_info and not argument.alias_info.is_write for argument in func._schema.arguments)
    return func.namespace == "aten" and not views and torch.Tag.nondeterministic_seeded not in func.tags


def _is_inexact(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Returns True if more than one rounding leads to the result, so that its last bits are the implementation's."""
    name = _name(func)
    of_complex = any(tensor.is_complex() for tensor in tensors_in((args, dict(kwargs))))
    if name == "pow":
        return of_complex or func._overloadname != "Tensor_Scalar" or args[1] not in _PLAIN_POWERS
    if name not in _EXACT:
        return True
    if kwargs.get("alpha", 1) != 1 or (name == "rsub" and args[2:] not in ((), (1,))):
        return True
    if kwargs.get("rounding_mode") is not None:
        return True
    return name in _OF_COMPLEX and of_complex


def _gives_views(func: Any, result: Any, args: Sequence[Any]) -> bool:
    """Returns True for views that the schema does not tell of, such as `meshgrid`'s."""
    if func._schema.is_mutable:
        return False
    given = {tensor.untyped_storage()._cdata for tensor in tensors_in(args)}
    return any(tensor.untyped_storage()._cdata in given for tensor in tensors_in(result))


def _plain(nest: Any) -> bool:
    """Returns True if all tensors lie on the CPU and have data."""
    return all(tensor.device.type == "cpu" and not isinstance(tensor, FakeTensor) for tensor in tensors_in(nest))


def _widened(nest: Any) -> Any:
    """Copies what is of a floating type into the wider one; types that are arguments become the wider, too."""
    if isinstance(nest, torch.Tensor):
        return nest.to(_WIDER.get(nest.dtype, nest.dtype), copy=nest.is_floating_point() or nest.is_complex())
    if isinstance(nest, torch.dtype):
        return _WIDER.get(nest, nest)
    if isinstance(nest, (list, tuple)):
        return type(nest)(map(_widened, nest))
    if isinstance(nest, dict):
        return {key: _widened(value) for key, value in nest.items()}
    return nest


def _attempt(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Calls an operator in the wider type; None where it has no kernel for it, and the result stays as it is."""
    try:
        return func(*args, **kwargs)
    except (NotImplementedError, RuntimeError):
        return None


def _extended(name: str, args: Sequence[Any]) -> torch.Tensor | None:
    """Computes a float64 operator in extended precision; returns None for an operator that is not elementwise."""
    function = _EXTENDED.get(name)
    if function is None:
        return None
    with np.errstate(all="ignore"):
        given = [arg.numpy() if isinstance(arg, torch.Tensor) else arg for arg in args]
        wide = function(*(np.asarray(arg, np.longdouble) for arg in given))
    return torch.from_numpy(np.asarray(wide.astype(np.float64)))


def _copy(results: Any, better: Any) -> None:
    """Writes the better values into the results, each rounded once."""
    if better is None:
        return
    for result, values in zip(tensors_in(results), tensors_in(better), strict=True):
        if result.is_floating_point() or result.is_complex():
            result.copy_(values)
