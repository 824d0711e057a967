"""Triton's interpreter, made to compute as a GPU does, and to check each load and store.

Import this first: Triton decides when it is imported whether it interprets.

The interpreter of Triton 3.7 truncates to bfloat16 and loses the carry when it rounds to float8, so torch converts. It
has no libdevice, which NumPy stands for. It reduces by a function of one's own element by element; here halves are
combined until one element is left, as a GPU's threads do. Inductor's decorators, which tune, are left out.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

import ctypes
import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tests  # noqa: F401  (says how torch is to compute, before torch is imported)

import numpy as np  # isort: skip
import torch  # isort: skip
import triton.language as tl
from torch._inductor.runtime import triton_helpers, triton_heuristics
from triton.runtime import interpreter
from triton.runtime.interpreter import TensorHandle

from tests.twins.memory import Fault, Memory, Pointer
from tests.twins.written import Kernel

_TORCH = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8e4nv": torch.float8_e4m3fn,
    "fp8e5": torch.float8_e5m2,
}
_SCALARS = {
    "i1": (ctypes.c_bool, np.bool_),
    "i8": (ctypes.c_int8, np.int8),
    "i32": (ctypes.c_int32, np.int32),
    "i64": (ctypes.c_int64, np.int64),
    "fp32": (ctypes.c_float, np.float32),
    "fp64": (ctypes.c_double, np.float64),
}
_HEURISTICS = ("pointwise", "reduction", "persistent_reduction", "split_scan", "cooperative_reduction", "foreach")


class Kernels:
    """The kernels of one engine. Calling one runs all programs of its grid.

    Args:
        folder: of their files.
    """

    def __init__(self, folder: Path, kernels: Mapping[str, Kernel]) -> None:
        self.launched: dict[str, int] = dict.fromkeys(kernels, 0)
        self._kernels, self._memory = kernels, Memory()
        _interpret(self._memory)
        self._functions = {name: _function(folder / kernel.file, name) for name, kernel in kernels.items()}

    def __call__(self, name: str, grid: tuple[int, int, int], arguments: Sequence[int]) -> None:
        """Runs a kernel.

        Args:
            arguments: the addresses of those that the form does not settle, as CUDA's driver takes them.

        Raises:
            Fault: it reads or writes what it must not, or an argument is not aligned as it was told.
        """
        kernel = self._kernels[name]
        self.launched[name] += 1
        self._memory.clear()
        values: list[Any] = []
        rest = iter(arguments)
        for place, (argument, kind) in enumerate(kernel.signature.items()):
            if kind == "constexpr":
                values.append(kernel.settled[argument])
            else:
                values.append(self._value(f"{name}, {argument}", kind, next(rest), place in kernel.aligned))
        try:
            with np.errstate(all="ignore"):
                self._functions[name][grid](*values)
        except interpreter.InterpreterError as error:
            raise Fault(f"{name}: {error.__cause__ or error}") from error

    def _value(self, what: str, kind: str, address: int, aligned: bool) -> tl.tensor:
        type_ = tl.str_to_ty(kind, None)
        if kind.startswith("*"):
            pointer = Pointer.from_address(ctypes.c_uint64.from_address(address).value)
            told, value = pointer.data, np.array([self._memory.add(what, pointer)], np.uint64)
        else:
            c_type, np_type = _SCALARS[kind]
            told = c_type.from_address(address).value
            value = np.array([told], np_type)
        if aligned and told % 16:
            raise Fault(f"{what} is not divisible by 16, which the kernel was compiled for")
        return tl.tensor(TensorHandle(value, type_), type_)


def _function(file: Path, name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


def _interpret(memory: Memory) -> None:
    """Puts what is said above into Triton and Inductor, for this process."""
    interpreter._convert_float = _converted
    interpreter.ReduceOps.generic_reduce = _reduced
    builder: Any = interpreter.InterpreterBuilder
    builder.create_masked_load, builder.create_masked_store = _checked(memory)
    builder.create_atomic_rmw = builder.create_atomic_cas = _no_atomics
    triton_helpers.libdevice = _Libdevice()
    triton_helpers.set_driver_to_gpu = lambda: None
    for name in _HEURISTICS:
        setattr(triton_heuristics, name, lambda *_, **__: lambda function: function)


def _checked(memory: Memory) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Returns the interpreter's load and store, of places that are looked up."""

    def load(_: Any, pointers: Any, mask: Any, other: Any, *hints: Any) -> TensorHandle:
        kind = pointers.get_element_ty()
        dtype = interpreter._get_np_dtype(kind)
        places = memory.places(pointers.data, mask.data, dtype.itemsize, "a load")
        fill = np.zeros_like(places, dtype=dtype) if other is None else other.data
        wanted = np.ascontiguousarray(np.broadcast_to(mask.data, places.shape))
        return TensorHandle(interpreter._interpreter.load(places, wanted, fill, dtype), kind)

    def store(_: Any, pointers: Any, value: Any, mask: Any, *hints: Any) -> Any:
        dtype = interpreter._get_np_dtype(pointers.get_element_ty())
        places = memory.places(pointers.data, mask.data, dtype.itemsize, "a store")
        wanted = np.ascontiguousarray(np.broadcast_to(mask.data, places.shape))
        data = np.ascontiguousarray(np.broadcast_to(value.data, places.shape))
        assert data.itemsize == dtype.itemsize
        return interpreter._interpreter.store(places, data, wanted)

    return load, store


def _no_atomics(*_: Any) -> None:
    raise Fault("an atomic operation, which nobody here has compared with a GPU's")


def _converted(data: np.ndarray, before: Any, after: Any, rounding: Any) -> np.ndarray:
    """Returns floating-point numbers in another type, as the bits that the interpreter keeps."""
    bits = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
    numbers = torch.from_numpy(bits.copy()).view(_TORCH[before.name]).to(_TORCH[after.name])
    kept = numbers.view(torch.uint8).numpy().view(f"uint{after.primitive_bitwidth}")
    return kept.reshape(data.shape)


def _reduced(reduction: Any, given: tuple[Any, ...]) -> list[Any]:
    """Returns what a function of one's own makes of all elements along an axis."""
    whole = reduction.axis is None
    given, axis = reduction.unravel(given, reduction.axis)
    parts = [item.handle.data for item in given]
    kinds = [item.dtype for item in given]
    while (size := parts[0].shape[axis]) > 1:
        assert size % 2 == 0, "blocks are powers of two"
        halves = [np.split(part, 2, axis) for part in parts]
        first = [reduction.to_tensor(half[0], kind) for half, kind in zip(halves, kinds, strict=True)]
        second = [reduction.to_tensor(half[1], kind) for half, kind in zip(halves, kinds, strict=True)]
        combined = reduction.combine_fn.fn(*first, *second)
        results = combined if isinstance(combined, tuple) else (combined,)
        parts = [result.handle.data for result in results]
    if not reduction.keep_dims:
        parts = [part.squeeze(axis) for part in parts]
    elif whole:
        parts = [part.reshape([1] * len(given[0].shape)) for part in parts]
    return [reduction.to_tensor(part, kind) for part, kind in zip(parts, kinds, strict=True)]


class _Libdevice:
    """CUDA's library of mathematical functions, by NumPy."""

    _ERF = np.vectorize(math.erf, otypes=[np.float64])
    _FUNCTIONS: Mapping[str, Callable[..., np.ndarray]] = {
        **{
            name: getattr(np, name) for name in ("exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "sqrt", "sin")
        },
        **{name: getattr(np, name) for name in ("cos", "tan", "tanh", "floor", "ceil", "trunc", "rint", "abs", "fmod")},
        "pow": np.power,
        "rsqrt": lambda x: 1 / np.sqrt(x),
        "erf": lambda x: _Libdevice._ERF(x),
        "nearbyint": np.rint,
        "isnan": np.isnan,
        "isinf": np.isinf,
    }

    def __getattr__(self, name: str) -> Callable[..., tl.tensor]:
        function = self._FUNCTIONS[name]

        def call(*given: Any) -> tl.tensor:
            first = next(item for item in given if isinstance(item, tl.tensor))
            data = [item.handle.data if isinstance(item, tl.tensor) else item for item in given]
            result = function(*data)
            if name.startswith("is"):
                kind = tl.block_type(tl.int1, first.shape) if first.type.is_block() else tl.int1
                return tl.tensor(TensorHandle(result.astype(bool), tl.int1), kind)
            return tl.tensor(TensorHandle(result.astype(first.handle.data.dtype), first.handle.dtype), first.type)

        return call
