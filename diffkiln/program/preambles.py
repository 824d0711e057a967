"""Programs of a component that a call runs before its denoising loop: what they give does not follow the latents."""

from __future__ import annotations

from diffkiln.program.ir import REGION, Module


def loop_regions(module: Module) -> frozenset[str]:
    """Returns the regions of a component that some program calls which is no preamble."""
    programs = [program for program in module.programs.values() if not program.ahead]
    return frozenset(op.attrs["region"] for program in programs for op in program.ops if op.name == REGION)
