"""A component's program as one region, its repeated blocks written out."""

from __future__ import annotations

from dataclasses import replace

from diffkiln.program import REGION, Builder, Module, Program, caller_of


def whole(module: Module) -> Module:
    """Returns the component with one region for each of its programs, which only calls the region."""
    regions = {name: _inlined(program, name, module) for name, program in module.programs.items()}
    programs = {name: caller_of(program) for name, program in module.programs.items()}
    return replace(module, programs=programs, regions=regions)


def _inlined(program: Program, name: str, module: Module) -> Program:
    """Returns the program with operators instead of its regions. A region's weights are those of its instance."""
    edit = Builder(program, name=name)
    for at, op in enumerate(program.ops):
        if op.name == REGION:
            edit.inline(at, module.regions[op.attrs["region"]])
    return edit.build()
