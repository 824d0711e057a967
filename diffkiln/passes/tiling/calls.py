"""Calls of one component program that do not need each other, shared among processes: what a request decides for each
step before the first one."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from diffkiln.passes.tiling.parts import Part, part_at
from diffkiln.passes.tiling.spreading import spread_parts
from diffkiln.program import CALL, Mesh, Module, Program
from diffkiln.program.ir import SHARED
from diffkiln.program.operators import nbytes


def calls_of(call: Program, component: str, name: str) -> list[Part]:
    """Returns the calls of one program of a component in their order, without those that need another of them."""
    found: list[Part] = []
    made: set[str] = set()
    for at, op in enumerate(call.ops):
        own = op.name == CALL and (op.attrs["component"], op.attrs["program"]) == (component, name)
        needs = any(ref.name in made for ref in op.uses)
        if own and not needs:
            found.append(part_at(call, [at]))
        if own or needs:
            made.update(op.outputs)
    return found


def spread_preambles(call: Program, module: Module, mesh: Mesh) -> tuple[Program, list[str]]:
    """Shares the calls that a component gets before the first step, where that saves more than it sends.

    The calls of a program are shared if each process then reads fewer bytes of weights, by more than it sends.

    Args:
        call: of a pipeline.
        module: the component.
        mesh: the processes.

    Returns:
        The call, and how many calls of each preamble that is shared one process makes.
    """
    notes: list[str] = []
    for name, program in module.programs.items():
        # Where processes exchange tensors within a program, all of them run each of its calls.
        if not program.ahead or any(op.name in SHARED for op in program.ops):
            continue
        parts = calls_of(call, module.component, name)
        forms = Counter(part.form for part in parts)
        alike = [part for part in parts if forms[part.form] > 1]
        spread, own = spread_parts(call, alike, mesh)
        given = sum(nbytes(program.types[ref.name]) for ref in program.outputs)
        if (len(alike) - own) * _read(module, program) > own * (mesh.size - 1) * given:
            call = spread
            notes.append(f"each process makes {own} of {len(alike)} calls of {name}")
    return call, notes


def _read(module: Module, program: Program) -> int:
    """Returns the bytes of the weights that one call of a component's program reads."""
    weights = dict(replace(module, programs={program.name: program}).weight_types())
    return sum(map(nbytes, weights.values()))
