"""Convolutions, pools, norms, resampling and Fourier transforms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from diffkiln.program.ir import TensorType
from diffkiln.program.operators.promotion import complex_of, floating, promote, real_of
from diffkiln.program.operators.table import (
    MAX_WINDOW,
    axes,
    axis,
    flag,
    integer,
    integers,
    number,
    one_of,
    operator,
    require,
    sizes,
    tensor,
)


def _window(values: Any, rank: int, low: int) -> tuple[int, ...]:
    found = integers(values, low, MAX_WINDOW)
    require(len(found) in (1, rank), f"{values!r} is not for {rank} dimensions")
    return found * rank if len(found) == 1 else found


# -- convolutions --


def _convolved(
    input: Any,
    weight: Any,
    bias: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: Any,
    rank: int,
    output_padding: Any = None,
) -> TensorType:
    """Returns the type of a convolution, or, with `output_padding`, of a transposed one."""
    given, kernel = tensor(input), tensor(weight)
    require(len(kernel.shape) == rank + 2, f"{kernel} is no kernel of {rank} dimensions")
    require(len(given.shape) in (rank + 1, rank + 2), f"{given} is no input of {rank} dimensions")
    require(given.dtype == kernel.dtype, f"{given} and {kernel} have different dtypes")
    require(min(kernel.shape) > 0 and max(kernel.shape[2:], default=1) <= MAX_WINDOW, f"{kernel} is no kernel")
    parts = integer(groups, 1)
    transposed = output_padding is not None
    channels = kernel.shape[0] if transposed else kernel.shape[1] * parts
    out = kernel.shape[1] * parts if transposed else kernel.shape[0]
    require(given.shape[-rank - 1] == channels and kernel.shape[0] % parts == 0, f"{given} has not {channels} channels")
    if bias is not None:
        require(tensor(bias) == TensorType(given.dtype, (out,)), f"{bias} is no bias of {out} channels")
    steps, pads, spread = _window(stride, rank, 1), _window(padding, rank, 0), _window(dilation, rank, 1)
    more = _window(output_padding, rank, 0) if transposed else (0,) * rank
    shape = []
    for place, size in enumerate(given.shape[-rank:]):
        reach = spread[place] * (kernel.shape[2 + place] - 1)
        if transposed:
            require(more[place] < max(steps[place], spread[place]), "output_padding is smaller than the stride")
            found = (size - 1) * steps[place] - 2 * pads[place] + reach + more[place] + 1
        else:
            found = (size + 2 * pads[place] - reach - 1) // steps[place] + 1
        require(found > 0 and size > 0, f"{given} is smaller than its kernel")
        shape.append(found)
    return TensorType(given.dtype, (*given.shape[: -rank - 1], out, *shape))


def _convolution_of(rank: int) -> Any:
    def convolution(
        input: Any,
        weight: Any,
        bias: Any = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: Any = 1,
    ) -> TensorType:
        return _convolved(input, weight, bias, stride, padding, dilation, groups, rank)

    def by_word(
        input: Any,
        weight: Any,
        bias: Any = None,
        stride: Any = 1,
        padding: Any = "valid",
        dilation: Any = 1,
        groups: Any = 1,
    ) -> TensorType:
        if one_of(padding, ("valid", "same")) == "valid":
            return _convolved(input, weight, bias, stride, 0, dilation, groups, rank)
        require(set(integers(stride)) == {1}, 'padding "same" takes strides of 1')
        given, kernel = tensor(input), tensor(weight)
        whole = _convolved(input, weight, bias, 1, MAX_WINDOW, dilation, groups, rank)
        require(len(kernel.shape) == rank + 2, f"{kernel} is no kernel of {rank} dimensions")
        return TensorType(given.dtype, (*whole.shape[:-rank], *given.shape[-rank:]))

    def transposed(
        input: Any,
        weight: Any,
        bias: Any = None,
        stride: Any = 1,
        padding: Any = 0,
        output_padding: Any = 0,
        groups: Any = 1,
        dilation: Any = 1,
    ) -> TensorType:
        return _convolved(input, weight, bias, stride, padding, dilation, groups, rank, output_padding)

    return convolution, by_word, transposed


for _rank in (1, 2, 3):
    _plain, _word, _back = _convolution_of(_rank)
    operator(f"conv{_rank}d")(_plain)
    operator(f"conv{_rank}d.padding")(_word)
    operator(f"conv_transpose{_rank}d" + ("" if _rank == 1 else ".input"))(_back)


@operator("convolution")
def _convolution(
    input: Any,
    weight: Any,
    bias: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: Any,
    output_padding: Any,
    groups: Any,
) -> TensorType:
    rank = len(tensor(weight).shape) - 2
    require(rank in (1, 2, 3), f"{weight} is no kernel")
    more = output_padding if flag(transposed) else None
    return _convolved(input, weight, bias, stride, padding, dilation, groups, rank, more)


# -- pools --


def _pooled(
    self: Any, kernel_size: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: Any, rank: int
) -> TensorType:
    given = tensor(self)
    require(len(given.shape) in (rank + 1, rank + 2), f"{given} is no input of {rank} dimensions")
    kernel = _window(kernel_size, rank, 1)
    steps = kernel if stride == () else _window(stride, rank, 1)
    pads, spread = _window(padding, rank, 0), _window(dilation, rank, 1)
    flag(ceil_mode)
    shape = []
    for place, size in enumerate(given.shape[-rank:]):
        require(2 * pads[place] <= kernel[place], "padding is at most half of the kernel")
        room = size + 2 * pads[place] - spread[place] * (kernel[place] - 1) - 1
        found = (room + (steps[place] - 1 if ceil_mode else 0)) // steps[place] + 1
        if ceil_mode and (found - 1) * steps[place] >= size + pads[place]:
            found -= 1
        require(room >= 0 and found > 0, f"{given} is smaller than its window")
        shape.append(found)
    return TensorType(given.dtype, (*given.shape[:-rank], *shape))


def _pools_of(rank: int) -> Any:
    def average(
        self: Any,
        kernel_size: Any,
        stride: Any = (),
        padding: Any = 0,
        ceil_mode: Any = False,
        count_include_pad: Any = True,
        divisor_override: Any = None,
    ) -> TensorType:
        flag(count_include_pad)
        require(divisor_override is None, "divisor_override is not taken")
        return _pooled(self, kernel_size, stride, padding, 1, ceil_mode, rank)

    def greatest(
        self: Any, kernel_size: Any, stride: Any = (), padding: Any = 0, dilation: Any = 1, ceil_mode: Any = False
    ) -> TensorType:
        return _pooled(self, kernel_size, stride, padding, dilation, ceil_mode, rank)

    return average, greatest


for _rank in (1, 2, 3):
    _average, _greatest = _pools_of(_rank)
    operator(f"avg_pool{_rank}d")(_average)
    operator(f"max_pool{_rank}d")(_greatest)


def _adaptive_of(rank: int) -> Any:
    def adaptive(self: Any, output_size: Any) -> TensorType:
        given = tensor(self)
        require(len(given.shape) in (rank + 1, rank + 2), f"{given} is no input of {rank} dimensions")
        require(min(given.shape[-rank:]) > 0, f"{given} has nothing to average")
        return TensorType(given.dtype, (*given.shape[:-rank], *_window(output_size, rank, 1)))

    return adaptive


operator("adaptive_avg_pool1d")(_adaptive_of(1))
operator("adaptive_avg_pool2d")(_adaptive_of(2))


# -- norms --


def _parameters(given: TensorType, shape: Sequence[int], *values: Any) -> None:
    for value in values:
        if value is not None:
            require(tensor(value).shape == tuple(shape), f"{value} is not for {tuple(shape)}")


def _normalized(input: Any, normalized_shape: Any, *values: Any) -> TensorType:
    given, shape = tensor(input), sizes(normalized_shape)
    require(bool(shape) and given.shape[-len(shape) :] == shape, f"{given} does not end in {shape}")
    _parameters(given, shape, *values)
    return given


@operator("layer_norm")
def _layer_norm(
    input: Any, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: Any = 1e-5, cudnn_enable: Any = True
) -> TensorType:
    number(eps), flag(cudnn_enable)
    return _normalized(input, normalized_shape, weight, bias)


@operator("rms_norm")
def _rms_norm(input: Any, normalized_shape: Any, weight: Any = None, eps: Any = None) -> TensorType:
    require(eps is None or isinstance(eps, int | float), f"{eps!r} is no number")
    given = _normalized(input, normalized_shape, weight)
    if weight is None or tensor(weight).dtype == given.dtype:
        return given
    return TensorType(promote(given.dtype, tensor(weight).dtype), given.shape)


@operator("group_norm")
def _group_norm(
    input: Any, num_groups: Any, weight: Any = None, bias: Any = None, eps: Any = 1e-5, cudnn_enabled: Any = True
) -> TensorType:
    number(eps), flag(cudnn_enabled)
    given = tensor(input)
    require(len(given.shape) >= 2 and given.shape[1] % integer(num_groups, 1) == 0, f"{given} has no such groups")
    _parameters(given, given.shape[1:2], weight, bias)
    return given


@operator("batch_norm")
def _batch_norm(
    input: Any,
    weight: Any,
    bias: Any,
    running_mean: Any,
    running_var: Any,
    training: Any,
    momentum: Any,
    eps: Any,
    cudnn_enabled: Any,
) -> TensorType:
    number(momentum), number(eps), flag(cudnn_enabled)
    given = tensor(input)
    require(training is False, "batch_norm is not trained: training must be false")
    require(running_mean is not None and running_var is not None, "batch_norm takes what training found")
    require(len(given.shape) >= 2, f"{given} has no channels")
    _parameters(given, given.shape[1:2], weight, bias, running_mean, running_var)
    return given


@operator("instance_norm")
def _instance_norm(
    input: Any,
    weight: Any,
    bias: Any,
    running_mean: Any,
    running_var: Any,
    use_input_stats: Any,
    momentum: Any,
    eps: Any,
    cudnn_enabled: Any,
) -> TensorType:
    number(momentum), number(eps), flag(cudnn_enabled)
    given = tensor(input)
    require(running_mean is None and running_var is None, "instance_norm keeps no statistics")
    require(use_input_stats is True, "instance_norm takes the statistics of its input")
    require(len(given.shape) >= 3, f"{given} has no channels")
    _parameters(given, given.shape[1:2], weight, bias)
    return given


# -- resampling --


def _resampled(given: TensorType, output_size: Any, factors: Sequence[Any], rank: int) -> TensorType:
    """Returns the type of a resampled image.

    A factor that is not the ratio of the sizes leads torch to elements outside of the image, so it is refused.
    """
    require(len(given.shape) == rank + 2, f"{given} is no input of {rank} dimensions")
    shape = integers(output_size, 1)
    require(len(shape) == rank and min(given.shape) > 0, f"{output_size!r} is not for {rank} dimensions")
    for old, new, factor in zip(given.shape[2:], shape, factors, strict=True):
        require(new <= old * MAX_WINDOW, f"an image is enlarged by at most {MAX_WINDOW}")
        if factor is None:
            continue
        require(isinstance(factor, int | float) and math.isfinite(factor) and factor > 0, f"{factor!r} is no factor")
        require(int(old * factor) == new, f"a factor of {factor} does not make {new} of {old}")
    return TensorType(given.dtype, (*given.shape[:2], *shape))


def _by_size_or_factor(input: Any, output_size: Any, scale_factors: Any, rank: int) -> TensorType:
    given = tensor(input)
    require((output_size is None) != (scale_factors is None), "resampling takes a size or factors")
    if output_size is not None:
        return _resampled(given, output_size, [None] * rank, rank)
    require(isinstance(scale_factors, tuple | list) and len(scale_factors) == rank, "resampling takes a factor each")
    require(len(given.shape) == rank + 2, f"{given} is no input of {rank} dimensions")
    shape = []
    for old, factor in zip(given.shape[2:], scale_factors, strict=True):
        require(isinstance(factor, int | float) and math.isfinite(factor) and factor > 0, f"{factor!r} is no factor")
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


# -- Fourier transforms --

_NORMS = (None, "forward", "backward", "ortho")


def _transformed(given: TensorType, lengths: Sequence[int | None], places: Sequence[int], kind: str) -> TensorType:
    """Returns the type of a transform: "c" of complex numbers, "r" from real ones, "i" back to them."""
    require(bool(places) and bool(given.shape), f"{given} has no dimension to transform")
    shape = list(given.shape)
    for place, length in zip(places, lengths, strict=True):
        if length is not None:
            shape[place] = integer(length, 1)
    last = places[-1]
    if kind == "r":
        require(real_of(given.dtype) == given.dtype, f"{given} is not real")
        shape[last] = shape[last] // 2 + 1
    elif kind == "i" and lengths[-1] is None:
        shape[last] = 2 * (shape[last] - 1)
    require(min(shape[place] for place in places) > 0, f"{given} has nothing to transform")
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
        places = list(range(rank - count, rank)) if dim is None else list(axes(dim, rank))
        require(lengths is None or len(lengths) == len(places), "a transform takes a length for each dimension")
        return _transformed(given, lengths or [None] * len(places), places, kind)

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
