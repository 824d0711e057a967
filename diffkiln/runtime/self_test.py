"""Each engine against the replay of its region, on the same pseudo-random tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from diffkiln.errors import VerifyError
from diffkiln.interpreter.aten import Interpreter, dtype_of
from diffkiln.interpreter.gpu_decompositions import gpu_decompositions
from diffkiln.program import ATTENTION, Program, TensorType
from diffkiln.runtime.attention import packaged
from diffkiln.runtime.engines import comparing, holds_weights
from diffkiln.runtime.executor import Engine
from diffkiln.runtime.precision import float32_precision
from diffkiln.runtime.reference import NARROW, is_narrow, replay_in_float32

#: Largest error where both compute in float32, or in a wider type.
WIDE = 1e-4
#: The same for a region that rounds, which quantizing activations does: a last bit decides between two steps of int8.
ROUNDS = 2e-2
#: In a narrower type: an engine's largest error against float32, as a multiple of the replay's own error.
OVERALL = 2.0
#: The same for the worst slice of an output, whose error varies more. A row or a column that is read from a wrong place
#: has an error of the size of its values, hundreds of times the rounding.
OF_A_SLICE = 8.0


@dataclass(frozen=True)
class Errors:
    """The distance of a tensor from another: the relative L2 difference, and that of the worst slice.

    A slice has one index in one dimension, as a row has. Its difference is relative to a slice of average norm, so that
    slices near zero do not count.
    """

    overall: float
    worst_slice: float


def self_test(
    engine: Engine, region: Program, constants: Mapping[str, torch.Tensor], device: torch.device, what: str
) -> float:
    """Runs both and compares them. An engine that holds its weights is only run, since its replay has others.

    Where the region computes in a type narrower than float32, both are compared with its replay in float32: the engine
    may err by `OVERALL` times the replay's own error, and its worst slice by `OF_A_SLICE` times that of the replay.

    Returns:
        The largest relative L2 error over the outputs.

    Raises:
        VerifyError: a value that is not finite, another shape or dtype, or an error beyond the limit.
    """
    normal = Repeated(device)
    inputs = [sample(item.type, normal) for item in region.inputs]
    weights = {name: sample(region.types[f"@{name}"], normal) for name in region.weights}
    folded = {key: constants[key].to(device) for key in region.constants}
    # TF32, which torch's convolutions take by default, differs by more than float32 may.
    with torch.inference_mode(), float32_precision(False):
        expected = Interpreter(region, device, {ATTENTION: packaged, **gpu_decompositions(device)})(
            inputs, weights, folded
        )
        flat = [*inputs, *weights.values(), *folded.values()]
        engine.check(flat)
        with comparing(engine):
            given = engine(flat)
        if is_narrow(region) and not holds_weights(engine):
            exact = replay_in_float32(region, inputs, weights, folded, device)
        else:
            exact = expected
    worst = 0.0
    for index, (want, got, true) in enumerate(zip(expected, given, exact, strict=True)):
        if want.shape != got.shape or want.dtype != got.dtype:
            raise VerifyError(
                f"{what}: output {index} is {got.dtype} {tuple(got.shape)}, not {want.dtype} {tuple(want.shape)}"
            )
        if not torch.isfinite(got).all():
            raise VerifyError(f"{what}: output {index} of the engine holds values that are not finite")
        if not holds_weights(engine):
            worst = max(worst, _compared(region, errors(true, want), errors(true, got), f"{what}: output {index}"))
    return worst


def _compared(region: Program, own: Errors, found: Errors, what: str) -> float:
    """Returns an engine's error over all, if it is within what the replay's own error allows."""
    floor = _floor(region)
    for kind, allowed, have in (
        ("", max(floor, OVERALL * own.overall), found.overall),
        (" in one row or column", OF_A_SLICE * max(floor, own.worst_slice), found.worst_slice),
    ):
        if have > allowed:
            raise VerifyError(
                f"{what} of the engine differs from its replay by {have:.2e}{kind} (relative L2), more than "
                f"{allowed:.0e}. Build it again, or choose another backend"
            )
    return found.overall


def _floor(region: Program) -> float:
    """Returns the error that is always allowed: one rounding of the narrowest type, or float32's own."""
    narrow = [torch.finfo(dtype_of(kind.dtype)).eps / 2 for kind in region.types.values() if kind.dtype in NARROW]
    rounds = any(op.name.startswith("aten.round.") for op in region.ops)
    return max(*narrow, WIDE, ROUNDS if rounds and not narrow else 0.0)


class Repeated:
    """Normal values in float32: a prime number of them, drawn once, from which every tensor takes the next.

    The weights of a large block are hundreds of millions. To draw them all takes longer than to run the block, and to
    bring them to a GPU longer still.
    """

    _COUNT: ClassVar[int] = 2**20 - 3

    def __init__(self, device: torch.device) -> None:
        self._values = torch.randn(self._COUNT, generator=torch.Generator().manual_seed(0)).to(device)
        self._next = 0

    def __call__(self, count: int) -> torch.Tensor:
        """Returns the next `count` values, as a tensor of their own."""
        start, self._next = self._next, (self._next + count) % self._COUNT
        if start + count <= self._COUNT:
            return self._values[start : start + count].clone()
        return self._values.roll(-start).repeat(-(-count // self._COUNT))[:count]


def sample(type_: TensorType, normal: Callable[[int], torch.Tensor]) -> torch.Tensor:
    """Returns values that keep a network's activations near one, made of `normal(count)`; masks leave everything in."""
    dtype = dtype_of(type_.dtype)
    count = math.prod(type_.shape)
    if dtype.is_complex:
        pairs = normal(2 * count).reshape(*type_.shape, 2) * 0.5**0.5
        return torch.view_as_complex(pairs).to(dtype)
    values = normal(count).reshape(type_.shape)
    if dtype.is_floating_point:
        if len(type_.shape) == 2:
            values /= max(type_.shape[-1], 1) ** 0.5
        return values.to(dtype)
    return torch.ones_like(values, dtype=dtype) if dtype == torch.bool else (values > 0).to(dtype)


def errors(want: torch.Tensor, got: torch.Tensor) -> Errors:
    """Returns how far `got` is from `want`; both of one shape."""
    if not want.numel():
        return Errors(0.0, 0.0)
    a, b = want.double(), got.double()
    norm = float(a.norm().clamp_min(1e-12))
    squares = (a - b).square()
    overall = float(squares.sum()) ** 0.5
    worst = overall
    for dim, size in enumerate(a.shape):
        others = [other for other in range(a.ndim) if other != dim]
        slices = squares.sum(dim=others) if others else squares
        worst = max(worst, float(slices.max() * size) ** 0.5)
    return Errors(overall / norm, worst / norm)
