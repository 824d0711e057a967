"""Each engine against the replay of its region, on the same pseudo-random tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import ClassVar

import torch

from diffkiln.aten import Interpreter, dtype_of
from diffkiln.errors import VerifyError
from diffkiln.program import ATTENTION, Program, TensorType
from diffkiln.runtime.attention import packaged
from diffkiln.runtime.engines import holds_weights
from diffkiln.runtime.executor import Engine
from diffkiln.runtime.precision import float32_precision

#: Largest relative L2 difference between an engine and its replay, by the region's lowest precision.
TOLERANCE = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 6e-2}

#: The same for a region that rounds, which quantizing activations does: a last bit decides between two steps of int8.
ROUNDS = 2e-2


def self_test(
    engine: Engine, region: Program, constants: Mapping[str, torch.Tensor], device: torch.device, what: str
) -> float:
    """Run both and compare. An engine that holds its weights is only run, since its replay has others.

    Returns:
        The largest relative L2 difference over the outputs.

    Raises:
        VerifyError: a value that is not finite, another shape or dtype, or a difference beyond the tolerance.
    """
    normal = Repeated(device)
    inputs = [sample(item.type, normal) for item in region.inputs]
    weights = {name: sample(region.types[f"@{name}"], normal) for name in region.weights}
    folded = {key: constants[key].to(device) for key in region.constants}
    # TF32, which torch's convolutions take by default, differs by more than float32 may.
    with torch.inference_mode(), float32_precision(False):
        expected = Interpreter(region, device, {ATTENTION: packaged})(inputs, weights, folded)
        flat = [*inputs, *weights.values(), *folded.values()]
        engine.check(flat)
        given = engine(flat)
    worst = 0.0
    for index, (want, got) in enumerate(zip(expected, given, strict=True)):
        if want.shape != got.shape or want.dtype != got.dtype:
            raise VerifyError(
                f"{what}: output {index} is {got.dtype} {tuple(got.shape)}, not {want.dtype} {tuple(want.shape)}"
            )
        if not torch.isfinite(got).all():
            raise VerifyError(f"{what}: output {index} of the engine holds values that are not finite")
        worst = max(worst, 0.0 if holds_weights(engine) else _difference(want, got))
    limit = max(TOLERANCE.get(kind.dtype, 0.0) for kind in region.types.values())
    if any(op.name.startswith("aten.round.") for op in region.ops):
        limit = max(limit, ROUNDS)
    if worst > limit:
        raise VerifyError(
            f"{what}: the engine differs from its replay by {worst:.2e} (relative L2), more than {limit:.0e}"
        )
    return worst


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
        """The next `count` values, as a tensor of their own."""
        start, self._next = self._next, (self._next + count) % self._COUNT
        if start + count <= self._COUNT:
            return self._values[start : start + count].clone()
        return self._values.roll(-start).repeat(-(-count // self._COUNT))[:count]


def sample(type_: TensorType, normal: Callable[[int], torch.Tensor]) -> torch.Tensor:
    """Values that keep those of a network around one, made of `normal(count)`; masks that leave everything in."""
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


def _difference(want: torch.Tensor, got: torch.Tensor) -> float:
    a, b = want.double(), got.double()
    return float((a - b).norm() / a.norm().clamp_min(1e-12)) if a.numel() else 0.0
