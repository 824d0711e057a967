"""Ranges of repeated blocks that one process each runs: what a component's program says, and a process's part of it.

Blocks are shared out in the order in which they run. What follows from a block of a range before the range's last one
is the range's, too. What others read of it stands in one FROM_ONE operation behind the range, so each border is one
exchange. Everything else is computed by all processes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby

from diffkiln.program.builder import Builder
from diffkiln.program.first import for_others, taken
from diffkiln.program.ir import FROM_ONE, REGION, SHARED, Module, Op, Program, Ref, map_refs, weight_in
from diffkiln.program.mesh import LAYERS, Mesh
from diffkiln.program.operators import nbytes

#: How blocks are shared out: the index of the process that runs each, by the block's name.
Owners = Mapping[str, int]


def sizes_of(module: Module) -> dict[str, int]:
    """Returns the bytes of weights of each block, in the order in which blocks run."""
    found: dict[str, dict[str, int]] = {}
    for blocks in sorted(map(_blocks, module.programs.values()), key=_count, reverse=True):
        for op in blocks:
            region = module.regions[op.attrs["region"]]
            own = {weight_in(op, name): nbytes(region.types[f"@{name}"]) for name in region.weights}
            found.setdefault(op.attrs["instance"], {}).update(own)
    return {block: sum(weights.values()) for block, weights in found.items()}


def shared_out(sizes: Mapping[str, int], count: int) -> dict[str, int]:
    """Returns which process runs each block, in ranges of which the largest is as small as can be.

    Args:
        sizes: bytes of each block, in the order in which they run; not fewer blocks than processes.
        count: of processes.
    """
    low, high = max(sizes.values()), sum(sizes.values())
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(_filled([*sizes.values()], middle)) <= count else (middle + 1, high)
    lengths = _filled([*sizes.values()], low, count)
    owners = [index for index, length in enumerate(lengths) for _ in range(length)]
    return dict(zip(sizes, owners, strict=True))


def _filled(sizes: Sequence[int], limit: int, count: int = 0) -> list[int]:
    """Returns how many blocks each range has if each is filled up to a limit; at least `count` ranges."""
    lengths, room = list[int](), 0
    for at, size in enumerate(sizes):
        if not lengths or size > room or len(sizes) - at <= count - len(lengths):
            lengths.append(0)
            room = limit
        lengths[-1] += 1
        room -= size
    return lengths


def by_ranges(program: Program, owners: Owners, count: int) -> Program:
    """Returns a component's program in which each process runs the blocks of its range.

    Raises:
        ValueError: processes share something else of the program already.
    """
    if shared := next((op for op in program.ops if op.name in SHARED), None):
        raise ValueError(f"processes share {shared.outputs[0]} of {program.name} already")
    edit = Builder(program)
    for index, blocks in _ranges(program, owners):
        inside = _inside(program, blocks)
        made = {name: at for at in inside for name in program.ops[at].outputs}
        others = (op for at, op in enumerate(program.ops) if at not in inside)
        read = {ref.name for op in others for ref in op.uses} | {ref.name for ref in program.outputs}
        given = [name for name in made if name in read]
        own: dict[str, Ref] = {}
        for name in given:
            at = made[name]
            edit.rename_result(at, name, f"{name}.own")
            own[name] = Ref(edit.ops_at(at)[0].outputs[program.ops[at].outputs.index(name)])
        for at in inside:
            edit.replace(at, *(_with_own(op, own) for op in edit.ops_at(at)))
        attrs = {"axis": LAYERS, "count": count, "index": index}
        edit.insert(blocks[-1] + 1, Op(FROM_ONE, tuple(own.values()), tuple(given), attrs=attrs))
    return edit.build()


def _blocks(program: Program) -> list[Op]:
    return [op for op in program.ops if op.name == REGION and op.attrs["instance"]]


def _count(blocks: Sequence[Op]) -> int:
    return len({op.attrs["instance"] for op in blocks})


def _ranges(program: Program, owners: Owners) -> Iterator[tuple[int, list[int]]]:
    """Yields the calls of blocks that one process makes one after the other: its index, and where they stand."""
    calls = [at for at, op in enumerate(program.ops) if op.name == REGION and op.attrs["instance"]]
    for index, group in groupby(calls, lambda at: owners[program.ops[at].attrs["instance"]]):
        yield index, list(group)


def _inside(program: Program, blocks: Sequence[int]) -> list[int]:
    """Returns where the operations of a range stand: its blocks, and what follows from them up to the last one."""
    found, made = list[int](), set[str]()
    for at in range(blocks[0], blocks[-1] + 1):
        op = program.ops[at]
        if at in blocks or any(ref.name in made for ref in op.uses):
            found.append(at)
            made.update(op.outputs)
    return found


def _with_own(op: Op, own: Mapping[str, Ref]) -> Op:
    args, kwargs = (map_refs(given, lambda ref: own.get(ref.name, ref)) for given in (op.args, op.kwargs))
    return replace(op, args=args, kwargs=kwargs)


# -- a process's part --


def own_module(module: Module, index: int) -> Module:
    """Returns what the process of this index runs of a component, with the regions that it calls alone."""
    programs = {
        name: taken(program, lambda op: op.name == FROM_ONE and op.attrs["index"] != index)
        if any(op.name == FROM_ONE for op in program.ops)
        else program
        for name, program in module.programs.items()
    }
    if programs == module.programs:
        return module
    called = {op.attrs["region"] for program in programs.values() for op in program.ops if op.name == REGION}
    regions = {name: region for name, region in module.regions.items() if name in called}
    return replace(module, programs=programs, regions=regions)


def own_modules(modules: Mapping[str, Module], mesh: Mesh, rank: int) -> dict[str, Module]:
    """Returns what a process runs of all components."""
    index = mesh.index(rank, LAYERS)
    return {name: own_module(module, index) for name, module in modules.items()}


def own_call(call: Program, rank: int) -> Program:
    """Returns what a process runs of a call."""
    return for_others(call) if rank else call
