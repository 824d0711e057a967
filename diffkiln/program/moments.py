"""A call as its memory sees it: which groups of weights are in use when, and what its results take meanwhile.

Weights lie in *groups*: the repeated blocks, and the rest of each component. While a component runs, its own groups are
in memory, and beside them that of the block that runs. So a call is a line of *moments*, and each begins where a group
comes into use, or where a component ends.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from diffkiln.program.ir import CALL, REGION, STEP, Module, Op, Program, weight_in
from diffkiln.program.memory import memory_of, workspace
from diffkiln.program.schedule import SCHEDULER, is_ahead

#: A group of weights: the component, and the group's name.
Key = tuple[str, str]
#: The phases of a call in their order.
ENCODE, DENOISE, DECODE = PHASES = ("encode", "denoise", "decode")


@dataclass(frozen=True, slots=True)
class Moment:
    """A stretch of a call in which the same weights are in use.

    Attributes:
        phase: one of PHASES.
        component: the one that runs; empty between two.
        enters: the group that comes into use; None where none does.
        needs: the groups in use.
        results: the most bytes of results that are in memory.
    """

    phase: str
    component: str
    enters: Key | None
    needs: tuple[Key, ...]
    results: int


class Groups:
    """The groups of weights that programs use.

    Args:
        modules: components by name.
        key_of: finds the group of a component's weight.
        inside: (component, region) of engines that hold their weights themselves.
    """

    def __init__(
        self,
        modules: Mapping[str, Module],
        key_of: Callable[[str, str], Key],
        inside: Collection[tuple[str, str]] = (),
    ) -> None:
        self.modules, self._key_of, self._inside = modules, key_of, inside

    def own(self, component: str, program: str) -> list[Key]:
        """Returns the groups that a component's program needs throughout."""
        return list(dict.fromkeys(self._key_of(component, name) for name in self._own_weights(component, program)))

    def of_block(self, component: str, op: Op) -> Key | None:
        """Returns the group of the block that a REGION operation runs; None for what is no block, or has no weights."""
        if not op.attrs["instance"]:
            return None
        weights = self.modules[component].regions[op.attrs["region"]].weights
        return self._key_of(component, weight_in(op, weights[0])) if weights else None

    def entered(self, component: str, program: str) -> list[Key]:
        """Returns the groups in the order in which they come into use; one that serves neighbours comes once."""
        own = self.own(component, program)
        keys = (self.of_block(component, op) for op in self._program(component, program).ops if op.name == REGION)
        return [*own, *(key for key, _ in groupby(key for key in keys if key is not None and key not in own))]

    def _own_weights(self, component: str, program: str) -> Iterator[str]:
        """Yields the weights of operators around the blocks, and of regions that are no blocks."""
        listed = self._program(component, program)
        yield from listed.weights
        for op in listed.ops:
            if op.name != REGION or op.attrs["instance"] or (component, op.attrs["region"]) in self._inside:
                continue
            yield from self.modules[component].regions[op.attrs["region"]].weights

    def _program(self, component: str, program: str) -> Program:
        return self.modules[component].programs[program]


def moments(call: Program, groups: Groups) -> list[Moment]:
    """Returns the moments of a call in their order."""
    inner = _Inner(groups)
    listed: list[Moment] = []
    for op, phase, results in zip(call.ops, phases_of(call, groups.modules), memory_of(call, inner.peak), strict=True):
        if op.name != CALL:
            listed.append(Moment(phase, "", None, (), results))
            continue
        around = results - inner.peak(op)  # what the call holds beside the component
        listed += [replace(moment, phase=phase, results=around + moment.results) for moment in inner.moments(op)]
    return _merged(listed)


class _Inner:
    """The moments of components, each of which is looked at once."""

    def __init__(self, groups: Groups) -> None:
        self._groups = groups
        self._known: dict[tuple[str, str], list[Moment]] = {}
        self._regions: dict[tuple[str, str], int] = {}

    def moments(self, op: Op) -> list[Moment]:
        key = op.attrs["component"], op.attrs["program"]
        if key not in self._known:
            self._known[key] = _merged(self._found(*key))
        return self._known[key]

    def peak(self, op: Op) -> int:
        return max((moment.results for moment in self.moments(op)), default=0) if op.name == CALL else 0

    def _found(self, component: str, name: str) -> list[Moment]:
        program = self._groups.modules[component].programs[name]
        own = self._groups.own(component, name)
        found = [Moment("", component, key, tuple(own[: index + 1]), 0) for index, key in enumerate(own)]
        block: Key | None = None
        taken = memory_of(program, lambda op: self._inside(component, op, program))
        for op, results in zip(program.ops, taken, strict=True):
            key = self._groups.of_block(component, op) if op.name == REGION else None
            enters = key if key is not None and key not in own and key != block else None
            block = enters or block
            found.append(Moment("", component, enters, (*own, block) if block else tuple(own), results))
        return found

    def _inside(self, component: str, op: Op, program: Program) -> int:
        if op.name != REGION:
            return workspace(op, program)
        key = component, op.attrs["region"]
        if key not in self._regions:
            self._regions[key] = max(memory_of(self._groups.modules[component].regions[key[1]]), default=0)
        return self._regions[key]


def _merged(listed: Sequence[Moment]) -> list[Moment]:
    """Returns moments with those that no group begins joined to the ones before them."""
    merged: list[Moment] = []
    for moment in listed:
        last = merged[-1] if merged else None
        if last is None or moment.enters is not None or (last.phase, last.needs) != (moment.phase, moment.needs):
            merged.append(moment)
        elif moment.results > last.results:
            merged[-1] = replace(last, results=moment.results)
    return merged


def phases_of(call: Program, modules: Mapping[str, Module]) -> Iterator[str]:
    """Yields the phase of each operation of a call. A call that shows no steps encodes alone.

    Denoising begins where the denoiser is first called, which is the component that runs last before the first step's
    end; and it ends with the last step.
    """
    steps = [index for index, op in enumerate(call.ops) if op.name == STEP]
    if not steps:
        yield from [ENCODE] * len(call.ops)
        return
    calls = [(index, op) for index, op in enumerate(call.ops[: steps[0]]) if op.name == CALL]
    runs = [(index, op.attrs["component"]) for index, op in calls if not is_ahead(op, modules)]
    names = [name for _, name in runs if name != SCHEDULER]
    first = next((index for index, name in runs if names and name == names[-1]), 0)
    for index in range(len(call.ops)):
        yield ENCODE if index < first else DENOISE if index <= steps[-1] else DECODE
