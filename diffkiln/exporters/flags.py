"""Inductor's flags, as options of the backends that Inductor works for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field

from diffkiln.errors import Problem
from diffkiln.exporters.options import UNBROKEN, WEIGHTLESS, Options
from diffkiln.spec import Strict, Target


class Flags(Strict):
    """Flags of torch's Inductor, by its own names, that diffusers' guides recommend. Absent: as this torch has them.

    Source: https://huggingface.co/docs/diffusers/optimization/fp16 and .../tutorials/fast_diffusion.
    """

    conv_1x1_as_mm: bool | None = Field(None, description="Compute convolutions of one pixel as matrix products.")
    epilogue_fusion: bool | None = Field(None, description="Fuse what follows a matrix product into its kernel.")
    max_autotune: bool | None = Field(None, description="Time several kernels for each product, and take the fastest.")
    coordinate_descent_tuning: bool | None = Field(None, description="Tune each kernel's block sizes one by one.")
    coordinate_descent_check_all_directions: bool | None = Field(
        None, description="Tune neighbouring block sizes together, too."
    )
    force_fuse_int_mm_with_mul: bool | None = Field(
        None, description="Multiply an int8 product by its scale in the product's own kernel."
    )

    #: What decides something where no kernel is written by Triton.
    everywhere: ClassVar = frozenset({"conv_1x1_as_mm"})


#: By name.
FLAGS = tuple(sorted(Flags.model_fields))


class Inductors(Options):
    """The options of a backend that Inductor works for: its flags."""

    lowers: ClassVar[tuple[str, ...]] = FLAGS

    fullgraph: Annotated[bool, UNBROKEN] = True
    flags: Flags | None = Field(None, description="Flags of torch's Inductor, by its own names.")
    weights: Annotated[str | None, WEIGHTLESS] = None
    weight_budget_gb: Annotated[float | None, WEIGHTLESS] = None

    def lowered(self) -> dict[str, Any]:
        return self.flags.model_dump(exclude_none=True) if self.flags else {}

    def problems(self, component: str, module: torch.nn.Module | None, target: Target, where: str) -> Iterator[Problem]:
        for name, value in self.flags.model_dump(exclude_none=True).items() if self.flags else ():
            at = f"{where}.flags.{name}"
            if name not in Flags.everywhere and target.device == "cpu":
                yield Problem(at, f"it is for Triton's kernels, and {target.name} has none", "Remove it.")
            elif name == "conv_1x1_as_mm" and value and not (module and _has_convolutions_of_one(module)):
                yield Problem(at, f"{component} has no convolution of one pixel", "Remove it.")


def _has_convolutions_of_one(module: torch.nn.Module) -> bool:
    kinds = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
    return any(isinstance(part, kinds) and set(part.kernel_size) == {1} for part in module.modules())
