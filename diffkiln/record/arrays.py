"""NumPy arrays whose numbers depend on the request: what a pipeline computes without torch.

Many pipelines turn an image into numbers with NumPy before torch sees them: `np.array(image).astype(np.float32) / 255`.
Older ones end with `image.cpu().numpy()`. A `MarkedArray` has the shape and the type of that array. Each operation on
it is done to a marked tensor instead, so that it is recorded, with the types that NumPy would give. What is not in the
lists here stops the recording.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NoReturn
from unittest import mock

import numpy as np
import torch
import torch.utils._device

from diffkiln.errors import DataDependent
from diffkiln.record.tokens import as_tensor, holds_tokens

# torch remembers, when first asked, which functions `with torch.device("meta")` concerns. Asked while `torch.tensor` is
# replaced here, it would leave out the real one for good, and transformers would load models without their tables.
torch.utils._device._device_constructors()

_UFUNCS: dict[Any, Callable[..., torch.Tensor]] = {
    np.add: torch.add,
    np.subtract: torch.sub,
    np.multiply: torch.mul,
    np.true_divide: torch.div,
    np.negative: torch.neg,
    np.maximum: torch.maximum,
    np.minimum: torch.minimum,
}
_COMPARISONS: dict[Any, Callable[..., torch.Tensor]] = {
    np.less: torch.lt,
    np.less_equal: torch.le,
    np.greater: torch.gt,
    np.greater_equal: torch.ge,
}
#: What may be asked of the array itself, beside what this class defines.
_PLAIN = ("shape", "ndim", "dtype", "size", "marked")
#: Types of which a tensor has another: eight bits are float32 until torch asks for them, as their numbers are exact.
_TORCH = {
    np.dtype(np.float32): torch.float32,
    np.dtype(np.float64): torch.float64,
    np.dtype(np.uint8): torch.float32,
    np.dtype(np.bool_): torch.bool,
}


class MarkedArray(np.ndarray):
    """An array of a shape and a type whose numbers are those of a marked tensor.

    Args:
        marked: the tensor, of the type that stands for `dtype`.
        dtype: what NumPy's array would have.
    """

    marked: torch.Tensor

    def __new__(cls, marked: torch.Tensor, dtype: Any) -> MarkedArray:
        array = np.broadcast_to(np.zeros((), dtype), tuple(marked.shape)).view(cls)
        array.marked = marked
        return array

    def __getattribute__(self, name: str) -> Any:
        if name in _PLAIN or name in MarkedArray.__dict__ or name in ("__class__", "__dict__"):
            return super().__getattribute__(name)
        return _refuse(f"ndarray.{name}")

    def __array_finalize__(self, _source: Any) -> None:
        return

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        compares = ufunc in _COMPARISONS
        if method != "__call__" or kwargs or not (compares or ufunc in _UFUNCS):
            _refuse(f"{ufunc.__name__}.{method}")
        samples = [np.ones(1, item.dtype) if isinstance(item, np.ndarray) else item for item in inputs]
        dtype = np.result_type(*samples) if compares else ufunc(*samples).dtype
        if not compares and dtype.kind not in "f":
            _refuse(f"{ufunc.__name__} of {dtype}")
        operands = [_operand(item, dtype) for item in inputs]
        if not compares:
            return MarkedArray(_UFUNCS[ufunc](*operands), dtype)
        return MarkedArray(_COMPARISONS[ufunc](*operands), np.bool_)

    def __array_function__(self, function: Any, _types: Any, args: Any, kwargs: Any) -> Any:
        if function not in _FUNCTIONS:
            _refuse(function.__name__)
        return _FUNCTIONS[function](*args, **kwargs)

    def astype(self, dtype: Any, *_args: Any, **_kwargs: Any) -> MarkedArray:
        """Returns the array with another type, as NumPy's method does."""
        wanted = np.dtype(dtype)
        if wanted not in _TORCH or (wanted.kind == "u" and self.dtype != wanted):
            _refuse(f"ndarray.astype({wanted})")
        return MarkedArray(self.marked.to(_TORCH[wanted]), wanted)

    def transpose(self, *axes: Any) -> MarkedArray:
        """Returns the array with its axes in another order."""
        given = axes[0] if len(axes) == 1 and isinstance(axes[0], tuple | list) else axes
        return MarkedArray(self.marked.permute(tuple(given) or tuple(reversed(range(self.ndim)))), self.dtype)

    @property
    def T(self) -> MarkedArray:
        """Returns the array with its axes in the reverse order."""
        return self.transpose()

    def reshape(self, *shape: Any, **_kwargs: Any) -> MarkedArray:
        """Returns the array in another shape."""
        given = shape[0] if len(shape) == 1 and isinstance(shape[0], tuple | list) else shape
        return MarkedArray(self.marked.reshape(tuple(given)), self.dtype)

    def copy(self, *_args: Any, **_kwargs: Any) -> MarkedArray:
        """Returns the same numbers, which a write does not reach."""
        return MarkedArray(self.marked.clone(), self.dtype)

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Any:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, key: Any) -> Any:
        if any(isinstance(item, np.ndarray) for item in (key if isinstance(key, tuple) else (key,))):
            _refuse("ndarray.__getitem__")
        return MarkedArray(self.marked[key], self.dtype)

    def __setitem__(self, key: Any, value: Any) -> None:
        """Numbers where a mask is true, as `mask[mask < 0.5] = 0` does."""
        if not isinstance(key, MarkedArray) or key.dtype != np.bool_ or not isinstance(value, int | float):
            _refuse("ndarray.__setitem__")
        self.marked = torch.where(key.marked, torch.full((), value, dtype=self.marked.dtype), self.marked)

    def _read(self, *_args: Any) -> NoReturn:
        _refuse("numbers")

    __float__ = __int__ = __bool__ = __index__ = __complex__ = _read  # type: ignore[assignment]
    __contains__ = __array__ = __copy__ = __deepcopy__ = __reduce__ = __reduce_ex__ = _read  # type: ignore[assignment]
    __str__ = __format__ = _read  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"MarkedArray({self.shape}, {self.dtype})"

    def tensor(self) -> torch.Tensor:
        """Returns what `torch.from_numpy` would give."""
        return self.marked.to(torch.uint8) if self.dtype == np.uint8 else self.marked


def marked_array(tensor: torch.Tensor) -> MarkedArray:
    """Returns what `Tensor.numpy` would give of a marked tensor.

    Raises:
        DataDependent: its type is none of those that are recorded.
    """
    dtype = next((own for own, other in _TORCH.items() if other == tensor.dtype), None)
    if dtype is None:
        _refuse(f"arrays of {tensor.dtype}")
    return MarkedArray(tensor, dtype)


def _refuse(what: str) -> NoReturn:
    raise DataDependent(
        f"the pipeline computes by NumPy's {what} with numbers that depend on the request, which is not recorded"
    )


def _operand(item: Any, dtype: np.dtype[Any]) -> torch.Tensor:
    if isinstance(item, MarkedArray):
        return item.marked.to(_TORCH[dtype])
    return torch.from_numpy(np.asarray(item, dtype))


def _joined(join: Callable[..., torch.Tensor]) -> Callable[..., MarkedArray]:
    def joined(arrays: Any, axis: int = 0) -> MarkedArray:
        listed = list(arrays)
        if len({array.dtype for array in listed}) > 1 or not all(isinstance(array, MarkedArray) for array in listed):
            _refuse(join.__name__)
        return MarkedArray(join([array.marked for array in listed], axis), listed[0].dtype)

    return joined


def _vstack(arrays: Any) -> MarkedArray:
    """Returns the arrays below each other; those of one dimension are rows."""
    joined = _joined(torch.cat)
    return joined([array if array.ndim > 1 else _expanded(array, 0) for array in arrays])


def _tiled(array: MarkedArray, counts: Any) -> MarkedArray:
    each = tuple(counts) if isinstance(counts, tuple | list) else (counts,)
    return MarkedArray(array.marked.repeat(*((1,) * (array.ndim - len(each)) + each)), array.dtype)


def _expanded(array: MarkedArray, axis: int) -> MarkedArray:
    return MarkedArray(array.marked.unsqueeze(axis), array.dtype)


_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    np.concatenate: _joined(torch.cat),
    np.stack: _joined(torch.stack),
    np.vstack: _vstack,
    np.tile: _tiled,
    np.expand_dims: _expanded,
    np.transpose: lambda array, axes=None: array.transpose(*(axes or ())),
    np.moveaxis: lambda array, source, target: MarkedArray(array.marked.movedim(source, target), array.dtype),
    np.shape: lambda array: array.shape,
    np.ndim: lambda array: array.ndim,
}


@contextlib.contextmanager
def arrays_of(pixels: Callable[[Any], MarkedArray | None]) -> Iterator[None]:
    """Lets NumPy make marked arrays, and torch take them, inside the `with` block.

    Args:
        pixels: gives the array of an image that is being recorded; None of anything else.
    """
    from_numpy, tensor = torch.from_numpy, torch.tensor

    def array_like(original: Callable[..., Any]) -> Callable[..., Any]:
        def made(value: Any, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
            known = isinstance(value, list) and value and all(isinstance(item, MarkedArray) for item in value)
            found = np.stack(value) if known else value if isinstance(value, MarkedArray) else pixels(value)
            if found is None:
                with warnings.catch_warnings():  # NumPy's of tensors, which would name this line and not the caller's
                    warnings.filterwarnings("ignore", "__array__ implementation doesn't accept", DeprecationWarning)
                    return original(value, dtype, *args, **kwargs)
            return found if dtype is None else found.astype(dtype)

        return made

    def to_torch(value: Any) -> Any:
        return value.tensor() if isinstance(value, MarkedArray) else from_numpy(value)

    def copied(value: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(value, MarkedArray):
            return value.tensor().to(kwargs.get("dtype") or value.tensor().dtype)
        if holds_tokens(value):
            return as_tensor(value, kwargs.get("dtype"))
        return tensor(value, *args, **kwargs)

    with contextlib.ExitStack() as stack:
        for name in ("array", "asarray", "ascontiguousarray"):
            stack.enter_context(mock.patch.object(np, name, array_like(getattr(np, name))))
        stack.enter_context(mock.patch.object(torch, "from_numpy", to_torch))
        stack.enter_context(mock.patch.object(torch, "tensor", copied))
        yield
