"""Resampling of images and Fourier transforms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from diffkiln.program.ir import TensorType
from diffkiln.program.operators.promotion import FLOAT, category, complex_of, floating, real_of
from diffkiln.program.operators.table import (
    MAX_WINDOW,
    axes,
    axis,
    flag,
    integer,
    integers,
    one_of,
    operator,
    require,
    tensor,
)

# -- resampling --


def _resampled(given: TensorType, output_size: Any, factors: Sequence[Any], rank: int) -> TensorType:
    """Returns the type of a resampled image.

    A factor that is not the ratio of the sizes leads torch to elements outside of the image, so it is refused.
    """
    require(len(given.shape) == rank + 2, f"{given} is not an input of {rank} dimensions")
    shape = integers(output_size, 1)
    require(len(shape) == rank and min(given.shape) > 0, f"{output_size!r} is not for {rank} dimensions")
    for old, new, factor in zip(given.shape[2:], shape, factors, strict=True):
        require(new <= old * MAX_WINDOW, f"an image is enlarged by at most {MAX_WINDOW}")
        if factor is None:
            continue
        require(isinstance(factor, int | float) and math.isfinite(factor) and factor > 0, f"{factor!r} is not a factor")
        require(int(old * factor) == new, f"a factor of {factor} does not make {new} of {old}")
    return TensorType(given.dtype, (*given.shape[:2], *shape))


def _by_size_or_factor(input: Any, output_size: Any, scale_factors: Any, rank: int) -> TensorType:
    given = tensor(input)
    require((output_size is None) != (scale_factors is None), "resampling takes a size or factors")
    if output_size is not None:
        return _resampled(given, output_size, [None] * rank, rank)
    require(isinstance(scale_factors, tuple | list) and len(scale_factors) == rank, "resampling takes a factor each")
    require(len(given.shape) == rank + 2, f"{given} is not an input of {rank} dimensions")
    shape = []
    for old, factor in zip(given.shape[2:], scale_factors, strict=True):
        require(isinstance(factor, int | float) and math.isfinite(factor) and factor > 0, f"{factor!r} is not a factor")
        shape.append(int(old * factor))
    return _resampled(given, tuple(shape), scale_factors, rank)


def _nearest_of(rank: int) -> Any:
    def by_size(self: Any, output_size: Any, *scales: Any, **named: Any) -> TensorType:
        return _resampled(tensor(self), output_size, _factors(rank, scales, named), rank)

    def by_vector(input: Any, output_size: Any, scale_factors: Any) -> TensorType:
        return _by_size_or_factor(input, output_size, scale_factors, rank)

    return by_size, by_vector


def _smooth_of(rank: int) -> Any:
    def by_size(self: Any, output_size: Any, align_corners: Any, *scales: Any, **named: Any) -> TensorType:
        flag(align_corners)
        return _resampled(tensor(self), output_size, _factors(rank, scales, named), rank)

    def by_vector(input: Any, output_size: Any, align_corners: Any, scale_factors: Any) -> TensorType:
        flag(align_corners)
        return _by_size_or_factor(input, output_size, scale_factors, rank)

    return by_size, by_vector


def _factors(rank: int, scales: Sequence[Any], named: dict[str, Any]) -> list[Any]:
    names = ("scales",) if rank == 1 else ("scales_d", "scales_h", "scales_w")[-rank:]
    require(len(scales) <= rank and set(named) <= set(names[len(scales) :]), "resampling takes a factor each")
    given = dict(zip(names, scales, strict=False)) | named
    return [given.get(name) for name in names]


for _name, _rank in (("upsample_nearest", 1), ("upsample_nearest", 2), ("upsample_nearest", 3)):
    for _kind in (_name, f"_{_name}_exact"):
        _by_size, _by_vector = _nearest_of(_rank)
        operator(f"{_kind}{_rank}d")(_by_size)
        operator(f"{_kind}{_rank}d.vec")(_by_vector)
for _name, _rank in (
    ("upsample_linear1d", 1),
    ("upsample_bilinear2d", 2),
    ("upsample_bicubic2d", 2),
    ("_upsample_bilinear2d_aa", 2),
    ("_upsample_bicubic2d_aa", 2),
    ("upsample_trilinear3d", 3),
):
    _by_size, _by_vector = _smooth_of(_rank)
    operator(_name)(_by_size)
    operator(f"{_name}.vec")(_by_vector)


@operator("grid_sampler")
def _grid_sampler(input: Any, grid: Any, interpolation_mode: Any, padding_mode: Any, align_corners: Any) -> TensorType:
    """Returns the type of an image or a volume read at the positions of a grid.

    Modes are torch's numbers: bilinear, nearest, bicubic; and zeros, border, reflection.
    """
    given, positions = tensor(input), tensor(grid)
    rank = len(given.shape) - 2
    require(rank in (2, 3), f"{given} is neither an image nor a volume")
    require(given.dtype == positions.dtype, f"{given} and {positions} are of two types")
    require(category(given.dtype) == FLOAT, f"{given} is not of floating-point numbers")
    require(len(positions.shape) == rank + 2 and positions.shape[-1] == rank, f"{positions} names nothing in {given}")
    require(positions.shape[0] == given.shape[0], f"{positions} is not for {given.shape[0]} inputs")
    require(min(given.shape[2:]) > 0, f"{given} has no elements to read")
    integer(interpolation_mode, 0, 2 if rank == 2 else 1)
    integer(padding_mode, 0, 2)
    flag(align_corners)
    return TensorType(given.dtype, (*given.shape[:2], *positions.shape[1:-1]))


# -- Fourier transforms --

_NORMS = (None, "forward", "backward", "ortho")


def _transformed(given: TensorType, lengths: Sequence[int | None], dims: Sequence[int], kind: str) -> TensorType:
    """Returns the type of a transform: "c" of complex numbers, "r" from real ones, "i" back to them."""
    require(bool(dims) and bool(given.shape), f"{given} has no dimension to transform")
    shape = list(given.shape)
    for at, length in zip(dims, lengths, strict=True):
        if length is not None:
            shape[at] = integer(length, 1)
    last = dims[-1]
    if kind == "r":
        require(real_of(given.dtype) == given.dtype, f"{given} is not real")
        shape[last] = shape[last] // 2 + 1
    elif kind == "i" and lengths[-1] is None:
        shape[last] = 2 * (shape[last] - 1)
    require(min(shape[at] for at in dims) > 0, f"{given} has nothing to transform")
    dtype = complex_of(floating(given.dtype))
    return TensorType(real_of(dtype) if kind == "i" else dtype, tuple(shape))


def _transforms_of(kind: str) -> Any:
    def of_one(self: Any, n: Any = None, dim: Any = -1, norm: Any = None) -> TensorType:
        one_of(norm, _NORMS)
        given = tensor(self)
        return _transformed(given, [n], [axis(dim, len(given.shape))], kind)

    def of_two(self: Any, s: Any = None, dim: Any = (-2, -1), norm: Any = None) -> TensorType:
        return of_many(self, s, dim, norm)

    def of_many(self: Any, s: Any = None, dim: Any = None, norm: Any = None) -> TensorType:
        one_of(norm, _NORMS)
        given = tensor(self)
        rank = len(given.shape)
        lengths = None if s is None else integers(s, 1)
        count = rank if lengths is None else len(lengths)
        require(count <= rank, f"{given} has fewer dimensions than {count}")
        dims = list(range(rank - count, rank)) if dim is None else list(axes(dim, rank))
        require(lengths is None or len(lengths) == len(dims), "a transform takes a length for each dimension")
        return _transformed(given, lengths or [None] * len(dims), dims, kind)

    return of_one, of_two, of_many


for _kind, _names in {"c": ("fft", "ifft"), "r": ("rfft",), "i": ("irfft",)}.items():
    _one, _two, _many = _transforms_of(_kind)
    for _name in _names:
        operator(f"fft_{_name}")(_one)
        operator(f"fft_{_name}2")(_two)
        operator(f"fft_{_name}n")(_many)


@operator("fft_fftshift", "fft_ifftshift")
def _shifted(self: Any, dim: Any = None) -> TensorType:
    if dim is not None:
        axes(dim, len(tensor(self).shape))
    return tensor(self)
