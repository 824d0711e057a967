"""A component's program as one region, its repeated blocks written out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from diffkiln.program import REGION, Module, Op, Program, Ref, map_refs, rename_values


def whole(module: Module) -> Module:
    """The component with one region for each of its programs, which does nothing but call it."""
    regions = {name: replace(inlined(program, module.regions), name=name) for name, program in module.programs.items()}
    programs = {name: caller_of(program) for name, program in module.programs.items()}
    return replace(module, programs=programs, regions=regions)


def inlined(program: Program, regions: Mapping[str, Program]) -> Program:
    """The program with operators in the place of its regions. A region's weights are those of its instance."""
    types, ops = dict(program.types), list[Op]()
    renamed: dict[str, Ref] = {}

    def now(arg: Any) -> Any:
        return map_refs(arg, lambda ref: renamed.get(ref.name, ref))

    for index, op in enumerate(program.ops):
        op = replace(op, args=now(op.args), kwargs=now(op.kwargs))
        if op.name != REGION:
            ops.append(op)
            continue
        region = _placed(regions[op.attrs["region"]], op, index)
        ops += region.ops
        types |= region.types
        renamed |= dict(zip(op.outputs, region.outputs, strict=True))
    named = {name for op in ops for name in op.outputs} | {item.name for item in program.inputs}
    done = replace(program, ops=tuple(ops), outputs=now(program.outputs), types=types)
    used = named | set(done.uses())
    return replace(done, types={name: type_ for name, type_ in types.items() if name in used})


def _placed(region: Program, op: Op, index: int) -> Program:
    """A region's program with the names that its values have where this operation calls it."""
    names = {item.name: ref.name for item, ref in zip(region.inputs, op.args, strict=True)}  # type: ignore[union-attr]
    names |= {f"@{weight}": f"@{op.attrs['instance']}.{weight}" for weight in region.weights}
    names |= {name: f"%{index}.{name[1:]}" for step in region.ops for name in step.outputs}
    return rename_values(region, names)


def caller_of(program: Program) -> Program:
    """A program of the same inputs and outputs that is one call of the region of its name."""
    named = {item.name for item in program.inputs}
    fresh = tuple(f"%result.{index}" for index in range(len(program.outputs)))
    types = {name: type_ for name, type_ in program.types.items() if name in named}
    types |= {name: program.types[ref.name] for name, ref in zip(fresh, program.outputs, strict=True)}
    args = tuple(Ref(item.name) for item in program.inputs)
    call = Op(REGION, args, fresh, attrs={"region": program.name, "instance": ""})
    return replace(program, ops=(call,), outputs=tuple(map(Ref, fresh)), types=types)
