"""A program in phases: a part for each thing that values depend on, and the rest, which follows the latents."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from diffkiln.passes.hoisting.dependence import NOTHING, Depends, Found
from diffkiln.program import Builder, Input, Program, Ref, split_off

#: What the programs of the phases are called, in the order in which they are evaluated.
SUFFIXES: Mapping[Depends, str] = {
    NOTHING: "folded",
    Depends.SCHEDULE: "table",
    Depends.REQUEST: "preamble",
    Depends.SCHEDULE | Depends.REQUEST: "timed",
}


@dataclass(frozen=True)
class Phased:
    """A program in phases.

    Each part takes inputs of the whole, and results of other phases, under the names that they have in the whole.

    Attributes:
        phases: the parts that are evaluated ahead, by what they depend on, in order.
        rest: gives what the whole gives.
    """

    phases: Mapping[Depends, Program]
    rest: Program

    @property
    def given(self) -> frozenset[str]:
        """Returns the values that one part gives to another."""
        return frozenset(ref.name for phase in self.phases.values() for ref in phase.outputs)


def in_phases(program: Program, found: Found, chosen: Collection[int]) -> Phased:
    """Returns the program with some operations evaluated ahead.

    What else the parts need is computed in each of them again.

    Args:
        found: what its values depend on.
        chosen: places of the operations that are evaluated ahead, none of which follows the latents.
    """
    makers = {name: at for at in chosen for name in program.ops[at].outputs}
    rest = _cut(program, {ref.name for ref in program.outputs}, chosen)
    needed = _read(program, rest) & makers.keys()
    parts: dict[Depends, Program] = {}
    for on in reversed(list(SUFFIXES)):
        own = {at for at in chosen if found[program.ops[at].outputs[0]] == on}
        wanted = [name for at in sorted(own) for name in program.ops[at].outputs if name in needed]
        if not wanted:
            continue
        positions = _cut(program, set(wanted), set(chosen) - own)
        part = split_off(program, positions, tuple(map(Ref, wanted)))
        parts[on] = replace(part, name=f"{program.name}.{SUFFIXES[on]}", ahead=Depends.REQUEST in on)
        needed |= {item.name for item in part.inputs} & makers.keys()
    ahead = {on: parts[on] for on in SUFFIXES if on in parts}
    return Phased(ahead, _rest(program, rest, ahead))


def _cut(program: Program, wanted: set[str], left_out: Collection[int]) -> list[int]:
    """Returns the places of the operations that some values need, without those that are left out, in order."""
    live, positions = set(wanted), []
    for at in range(len(program.ops) - 1, -1, -1):
        op = program.ops[at]
        if at not in left_out and not live.isdisjoint(op.outputs):
            positions.append(at)
            live.update(ref.name for ref in op.uses)
    return positions[::-1]


def _read(program: Program, positions: Sequence[int]) -> set[str]:
    used = {ref.name for at in positions for ref in program.ops[at].uses}
    return used | {ref.name for ref in program.outputs}


def _rest(program: Program, positions: Sequence[int], ahead: Mapping[Depends, Program]) -> Program:
    """Returns the operations at these places with the results of the phases as inputs, after its own."""
    read = _read(program, positions)
    inputs = [item for item in program.inputs if item.name in read]
    results = (ref.name for part in ahead.values() for ref in part.outputs)
    inputs += [Input(name, program.types[name]) for name in results if name in read]
    # Python cannot call it any more: its inputs are no arguments of the module.
    fields = {"inputs": tuple(inputs), "ops": tuple(program.ops[at] for at in positions), "signature": {}}
    return Builder(program, **fields).build() if ahead else program
