"""A region as torch's own exported program: what the backends lower.

It is traced with fake tensors, so the memory of its weights is never taken. Weights and constants are inputs of the
graph like any other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from diffkiln.bundle.manifest import TensorSpec
from diffkiln.errors import ExportError
from diffkiln.exporters.artefact import Lowering
from diffkiln.exporters.base import contiguous, engine_inputs, spec_of
from diffkiln.interpreter.aten import Interpreter, Special, dtype_of
from diffkiln.program import Program
from diffkiln.program.sizes import Family


def examples(region: Program, device: str = "cpu") -> tuple[torch.Tensor, ...]:
    """Returns a fake tensor on the device for each of the engine's inputs."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        return tuple(torch.empty(t.shape, dtype=dtype_of(t.dtype), device=device) for t in engine_inputs(region))


def traced(
    lowering: Lowering, flat: tuple[torch.Tensor, ...], special: Mapping[str, Special] | None = None
) -> torch.export.ExportedProgram:
    """Returns the region as torch's own program; in a family, with symbols for the sizes that differ.

    Args:
        flat: from `examples`, on the device that the region is for.
        special: what is to take the place of operators, by name.

    Raises:
        ExportError: an operator takes one size only.
    """
    family = lowering.family
    if not family:
        return torch.export.export(_Region(lowering.region, flat, special), flat, strict=False)
    shapes: list[Any] = [{} for _ in flat]
    for (position, dimension), (smallest, largest) in family.ranges.items():
        shapes[position][dimension] = torch.export.Dim.AUTO(min=smallest, max=largest)
    module = _Region(lowering.region, flat, special, family)
    exported = torch.export.export(module, flat, strict=False, dynamic_shapes=(tuple(shapes),))
    values = [node.meta["val"] for node in exported.graph.nodes if node.op == "placeholder"]
    for position, dimension in family.ranges:
        if isinstance(values[position].shape[dimension], int):
            raise ExportError(f"its input {position} can have one size only in dimension {dimension}")
    return exported


def layouts(exported: torch.export.ExportedProgram, lowering: Lowering) -> tuple[TensorSpec, ...]:
    """Returns the layouts of the engine's outputs, at the region's own sizes."""
    region = lowering.region
    if lowering.family:
        return tuple(contiguous(region.types[ref.name]) for ref in region.outputs)
    (node,) = [node for node in exported.graph.nodes if node.op == "output"]
    return tuple(spec_of(value.meta["val"]) for value in node.args[0])


class _Region(torch.nn.Module):
    """A region as a module of its flat inputs. Outputs are contiguous, as the inputs of the next region must be."""

    def __init__(
        self,
        region: Program,
        flat: tuple[torch.Tensor, ...],
        special: Mapping[str, Special] | None,
        family: Family | None = None,
    ) -> None:
        super().__init__()
        self.region, self.family = region, family
        self.device, self.special = flat[0].device if flat else torch.device("cpu"), special

    def forward(self, *flat: torch.Tensor) -> tuple[torch.Tensor, ...]:
        region = self.region
        if self.family:
            region = self.family.at(lambda dimension: flat[dimension[0]].shape[dimension[1]])
        values = iter(flat)
        inputs = [next(values) for _ in region.inputs]
        weights = {name: next(values) for name in region.weights}
        constants = {key: next(values) for key in region.constants}
        outputs = Interpreter(region, self.device, self.special)(inputs, weights, constants)
        return tuple(out.clone() if any(out is x for x in flat) else out.contiguous() for out in outputs)
