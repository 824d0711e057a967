"""A component in phases: first each of its regions, for all its blocks alike, then its programs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from diffkiln.passes.hoisting.choosing import Rules, choose
from diffkiln.passes.hoisting.dependence import Depends, of_region, of_regions, spread, together
from diffkiln.passes.hoisting.phases import SUFFIXES, Phased, in_phases
from diffkiln.program import REGION, Builder, Module, Op, Program, Ref, weight_in
from diffkiln.program.operators import nbytes

#: What a region is called where its blocks do not follow the latents, and others of the class do.
_WHOLE = "whole"

#: What a program's inputs depend on, by the program's name.
Given = Mapping[str, Sequence[Depends]]


@dataclass(frozen=True)
class Divided:
    """A component in phases.

    Attributes:
        programs: each in phases, by name.
        regions: those that the parts call, by name.
        dear: how many operations stay in the loop, since what they give is larger than their weights.
    """

    programs: Mapping[str, Phased]
    regions: Mapping[str, Program]
    dear: int


def divide(module: Module, given: Given, rules: Rules) -> Divided:
    """Returns a component in phases.

    Args:
        given: what the inputs of its programs depend on.
        rules: decide which operations are evaluated ahead.
    """
    phased, dear = _phased_regions(module, given, rules)
    regions = _with_parts(module.regions, phased)
    programs: dict[str, Phased] = {}
    for name, program in module.programs.items():
        whole = _calling_parts(program, given[name], module.regions, phased)
        found = spread(whole, given[name], lambda op, args: of_region(regions[op.attrs["region"]], args))
        chosen = choose(whole, found, rules, lambda op: _weights_of(op, regions))
        programs[name] = in_phases(whole, found, chosen.ahead)
        dear += chosen.dear
    return Divided(programs, regions, dear)


def _phased_regions(module: Module, given: Given, rules: Rules) -> tuple[dict[str, Phased], int]:
    """Returns the regions of which some operations are evaluated ahead, in phases."""
    phased: dict[str, Phased] = {}
    dear = 0
    for name, inputs in of_regions(module, given).items():
        region = module.regions[name]
        found = spread(region, inputs)
        kept = _kept_in(region, name, module, rules)
        chosen = choose(region, found, replace(rules, keep=kept), lambda _: {})
        dear += chosen.dear
        if chosen.ahead:
            phased[name] = in_phases(region, found, chosen.ahead)
    return phased, dear


def _kept_in(region: Program, name: str, module: Module, rules: Rules) -> tuple[str, ...]:
    """Returns the region's own weights that stay: a layer that stays in one block stays in all of its class."""
    ops = [op for program in module.programs.values() for op in program.ops]
    calls = [op for op in ops if op.name == REGION and op.attrs["region"] == name]
    return tuple(weight for weight in region.weights if any(rules.keeps(weight_in(op, weight)) for op in calls))


def _with_parts(regions: Mapping[str, Program], phased: Mapping[str, Phased]) -> dict[str, Program]:
    found = dict(regions)
    for name, parts in phased.items():
        found[f"{name}.{_WHOLE}"] = replace(regions[name], name=f"{name}.{_WHOLE}")
        found[name] = parts.rest
        found |= {part.name: part for part in parts.phases.values()}
    return found


def _weights_of(op: Op, regions: Mapping[str, Program]) -> dict[str, int]:
    region = regions[op.attrs["region"]]
    return {weight_in(op, name): nbytes(region.types[f"@{name}"]) for name in region.weights}


def _calling_parts(
    program: Program, given: Sequence[Depends], regions: Mapping[str, Program], phased: Mapping[str, Phased]
) -> Program:
    """Returns the program with calls of a region's parts in the place of each call of the region."""
    found = spread(program, given, lambda op, args: of_region(regions[op.attrs["region"]], args))
    edit = Builder(program)
    for at, op in enumerate(program.ops):
        if op.name != REGION or op.attrs["region"] not in phased:
            continue
        if Depends.LATENTS in together(found.get(ref.name, Depends(0)) for ref in op.uses):
            _call_parts(edit, at, op, regions[op.attrs["region"]], phased[op.attrs["region"]])
        else:
            attrs = {**op.attrs, "region": f"{op.attrs['region']}.{_WHOLE}"}
            edit.replace(at, replace(op, attrs=attrs))
    return edit.build()


def _call_parts(edit: Builder, at: int, op: Op, region: Program, parts: Phased) -> None:
    values = {item.name: ref for item, ref in zip(region.inputs, op.uses, strict=True)}
    for on, part in parts.phases.items():
        args = tuple(values[item.name] for item in part.inputs)
        types = part.result_types(f"{op.outputs[0]}.{SUFFIXES[on]}")
        call = edit.op(REGION, args, types, attrs={**op.attrs, "region": part.name})
        edit.insert(at, call)
        values |= {ref.name: result for ref, result in zip(part.outputs, call.results, strict=True)}
    rest: tuple[Ref, ...] = tuple(values[item.name] for item in parts.rest.inputs)
    edit.replace(at, replace(op, args=rest))
