"""Convolutions, pools and norms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from diffkiln.program.ir import TensorType
from diffkiln.program.operators.promotion import promote
from diffkiln.program.operators.table import (
    MAX_WINDOW,
    flag,
    integer,
    integers,
    number,
    numbers,
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
    require(len(kernel.shape) == rank + 2, f"{kernel} is not a kernel of {rank} dimensions")
    require(len(given.shape) in (rank + 1, rank + 2), f"{given} is not an input of {rank} dimensions")
    require(given.dtype == kernel.dtype, f"{given} and {kernel} have different dtypes")
    require(min(kernel.shape) > 0 and max(kernel.shape[2:], default=1) <= MAX_WINDOW, f"{kernel} is not a kernel")
    parts = integer(groups, 1)
    transposed = output_padding is not None
    channels = kernel.shape[0] if transposed else kernel.shape[1] * parts
    out = kernel.shape[1] * parts if transposed else kernel.shape[0]
    require(given.shape[-rank - 1] == channels and kernel.shape[0] % parts == 0, f"{given} has not {channels} channels")
    if bias is not None:
        require(tensor(bias) == TensorType(given.dtype, (out,)), f"{bias} is not a bias of {out} channels")
    steps, pads, spread = _window(stride, rank, 1), _window(padding, rank, 0), _window(dilation, rank, 1)
    more = _window(output_padding, rank, 0) if transposed else (0,) * rank
    shape = []
    for at, size in enumerate(given.shape[-rank:]):
        reach = spread[at] * (kernel.shape[2 + at] - 1)
        if transposed:
            require(more[at] < max(steps[at], spread[at]), "output_padding is smaller than the stride")
            found = (size - 1) * steps[at] - 2 * pads[at] + reach + more[at] + 1
        else:
            found = (size + 2 * pads[at] - reach - 1) // steps[at] + 1
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
        require(len(kernel.shape) == rank + 2, f"{kernel} is not a kernel of {rank} dimensions")
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
    require(rank in (1, 2, 3), f"{weight} is not a kernel")
    more = output_padding if flag(transposed) else None
    return _convolved(input, weight, bias, stride, padding, dilation, groups, rank, more)


# -- pools --


def _pooled(
    self: Any, kernel_size: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: Any, rank: int
) -> TensorType:
    given = tensor(self)
    require(len(given.shape) in (rank + 1, rank + 2), f"{given} is not an input of {rank} dimensions")
    kernel = _window(kernel_size, rank, 1)
    steps = kernel if stride == () else _window(stride, rank, 1)
    pads, spread = _window(padding, rank, 0), _window(dilation, rank, 1)
    flag(ceil_mode)
    shape = []
    for at, size in enumerate(given.shape[-rank:]):
        require(2 * pads[at] <= kernel[at], "padding is at most half of the kernel")
        room = size + 2 * pads[at] - spread[at] * (kernel[at] - 1) - 1
        found = (room + (steps[at] - 1 if ceil_mode else 0)) // steps[at] + 1
        if ceil_mode and (found - 1) * steps[at] >= size + pads[at]:
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
        require(len(given.shape) in (rank + 1, rank + 2), f"{given} is not an input of {rank} dimensions")
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
    number(eps)
    flag(cudnn_enable)
    return _normalized(input, normalized_shape, weight, bias)


@operator("_weight_norm")
def _weight_norm(v: Any, g: Any, dim: Any = 0) -> TensorType:
    direction, length = tensor(v), tensor(g)
    dimension = integer(dim, 0)
    require(dimension < len(direction.shape), f"{direction} has no dimension {dimension}")
    wanted = tuple(size if at == dimension else 1 for at, size in enumerate(direction.shape))
    require(length == TensorType(direction.dtype, wanted), f"{length} is not the length of {direction}")
    return direction


@operator("rms_norm")
def _rms_norm(input: Any, normalized_shape: Any, weight: Any = None, eps: Any = None) -> TensorType:
    require(eps is None or isinstance(eps, int | float), f"{eps!r} is not a number")
    given = _normalized(input, normalized_shape, weight)
    if weight is None or tensor(weight).dtype == given.dtype:
        return given
    return TensorType(promote(given.dtype, tensor(weight).dtype), given.shape)


@operator("group_norm")
def _group_norm(
    input: Any, num_groups: Any, weight: Any = None, bias: Any = None, eps: Any = 1e-5, cudnn_enabled: Any = True
) -> TensorType:
    number(eps)
    flag(cudnn_enabled)
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
    numbers(momentum, eps)
    flag(cudnn_enabled)
    given = tensor(input)
    require(training is False, "batch_norm is not trained: training must be false")
    require(running_mean is not None and running_var is not None, "batch_norm takes the statistics of training")
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
    numbers(momentum, eps)
    flag(cudnn_enabled)
    given = tensor(input)
    require(running_mean is None and running_var is None, "instance_norm keeps no statistics")
    require(use_input_stats is True, "instance_norm takes the statistics of its input")
    require(len(given.shape) >= 3, f"{given} has no channels")
    _parameters(given, given.shape[1:2], weight, bias)
    return given
