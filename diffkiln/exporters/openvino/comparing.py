"""A new engine against the replay of its region, and against what a later load makes of it.

A load compares no engine that holds its weights with its replay, which has others. So that is done here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from diffkiln.bundle.openvino import COMPACT, MODEL, Facts, kept_beside
from diffkiln.errors import ExportError
from diffkiln.exporters.artefact import Lowering
from diffkiln.interpreter.aten import Interpreter, dtype_of, in_pairs
from diffkiln.program import Program, TensorType

#: Largest relative L2 error. In float32 it is that of the runtime's own comparison. bfloat16 keeps 8 bits, and a wrong
#: result has an error near one.
LIMITS = {"f32": 1e-4, "bf16": 0.1}
#: The same for a region that rounds, which quantizing activations does: a last bit decides between two steps of int8.
ROUNDS = 2e-2
#: The same where weights have fewer bits. The engine as it was before them has kept the limit above.
COMPRESSED = {"int8": 0.1, "int4": 0.7}
#: Between two compilations of one engine, whose kernels may add in another order.
AGAIN = 1e-5


def compare(openvino: Any, folder: Path, facts: Facts, lowering: Lowering) -> None:
    """Runs an engine, the engine as a later load finds it, and the replay, on the same seeded tensors.

    Raises:
        ExportError: OpenVINO cannot compile the engine, or two of them differ.
    """
    region = lowering.region
    tensors = _tensors(lowering)
    expected = [in_pairs(tensor) for tensor in _replayed(region, tensors)]
    given = _named(facts, tensors)
    settings = facts.settings(torch.get_num_threads())
    try:
        core = openvino.Core()
        compiled = core.compile_model(folder / MODEL, "CPU", {**settings, **COMPACT})
        found = _run(compiled, given)
        again = _run(core.import_model(compiled.export_model(), "CPU", settings | kept_beside(folder)), given)
    except RuntimeError as error:
        last = str(error).strip().splitlines()[-1][:300]
        raise ExportError(f"OpenVINO {facts.version} cannot run the engine: {last}. Choose another backend") from error
    limit = LIMITS[facts.inference_precision]
    if any(op.name.startswith("aten.round.") for op in region.ops):
        limit = max(limit, ROUNDS)
    if facts.weight_format is not None:
        limit = max(limit, COMPRESSED[facts.weight_format])
    _same(expected, found, limit, "the replay")
    _same(found, again, AGAIN, "itself, once it was compiled and kept")


def _same(wanted: list[torch.Tensor], found: list[torch.Tensor], limit: float, what: str) -> None:
    for index, (want, got) in enumerate(zip(wanted, found, strict=True)):
        if not (error := _error(want, got)) <= limit:
            raise ExportError(
                f"output {index} of OpenVINO's engine differs from {what} by {error:.1e} (relative L2), more than "
                f"{limit:.0e}. Choose another backend"
            )


def _run(compiled: Any, given: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    result = compiled({name: tensor.numpy() for name, tensor in given.items()})
    return [torch.from_numpy(array.copy()) for array in result.values()]


def _replayed(region: Program, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    values = iter(tensors)
    inputs = [next(values) for _ in region.inputs]
    weights = {name: next(values) for name in region.weights}
    constants = {key: next(values) for key in region.constants}
    with torch.inference_mode():
        return list(Interpreter(region, torch.device("cpu"))(inputs, weights, constants))


def _named(facts: Facts, tensors: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns the tensors that an engine takes, by their names in the graph."""
    named = zip(facts.inputs, tensors, strict=True)
    return {name: in_pairs(tensor).contiguous() for name, tensor in named if name is not None}


def _tensors(lowering: Lowering) -> list[torch.Tensor]:
    """Returns the region's inputs and weights, drawn where none are given, and its constants."""
    region, generator = lowering.region, torch.Generator().manual_seed(0)
    inputs = [_sample(item.type, generator) for item in region.inputs]
    weights = [
        lowering.weights[name].detach().cpu()
        if name in lowering.weights
        else _sample(region.types[f"@{name}"], generator)
        for name in region.weights
    ]
    return [*inputs, *weights, *(lowering.constants[key].cpu() for key in region.constants)]


def _sample(type_: TensorType, generator: torch.Generator) -> torch.Tensor:
    """Returns normal values, zeros and ones for integers, and True for masks, which leave everything in."""
    dtype = dtype_of(type_.dtype)
    if dtype == torch.bool:
        return torch.ones(type_.shape, dtype=dtype)
    if dtype.is_complex:
        return torch.randn(type_.shape, generator=generator, dtype=dtype)
    values = torch.randn(type_.shape, generator=generator)
    if len(type_.shape) == 2:  # as a layer's weights, which leave the size of activations as it is
        values /= max(type_.shape[-1], 1) ** 0.5
    return values.to(dtype) if dtype.is_floating_point else (values > 0).to(dtype)


def _error(want: torch.Tensor, got: torch.Tensor) -> float:
    """Returns the relative L2 distance; infinity for another shape."""
    if want.shape != got.shape:
        return float("inf")
    if not want.numel():
        return 0.0
    a, b = want.double(), got.double()
    return float((a - b).norm() / a.norm().clamp_min(1e-12))
