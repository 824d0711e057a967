"""Which weights a bundle's programs read, and when: that decides in which file they lie."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace

from diffkiln.program import REGION, Module, weight_in
from diffkiln.record.folds import Fold
from diffkiln.record.pipeline import Recording


@dataclass(frozen=True)
class Uses:
    """The uses of a component's weights, by their names.

    Attributes:
        read: those that some program reads.
        before: those of them that are read before the denoising loop alone.
        left_out: those that are not to be in the bundle.
        gone: nothing calls the component any more, so that none is in the bundle.
    """

    read: frozenset[str] = frozenset()
    before: frozenset[str] = frozenset()
    left_out: frozenset[str] = frozenset()
    gone: bool = False


def uses_of(recording: Recording, held: Collection[str] = ()) -> dict[str, Uses]:
    """Returns the uses of each component's weights. The engines of `held` components have those of their regions."""
    every = recording.weight_types()
    folding = {fold.component for fold in recording.folds if not fold.keeps}
    found = {name: Uses(gone=True) for name in folding - every.keys()}
    for name, types in recording.weight_types(held).items():
        folded = {weight for fold in recording.folds if fold.component == name for weight in _left_by(fold)}
        module = recording.modules.get(name)
        before = _before(module, _read_by_calls(recording, name)) if module else frozenset()
        found[name] = Uses(frozenset(types), before, frozenset(folded - every[name].keys()))
    return found


def _left_by(fold: Fold) -> Iterator[str]:
    """Yields the weights that leave the bundle where nothing else reads them."""
    if not fold.keeps:
        module = Module(fold.component, {fold.program.name: fold.program}, fold.regions)
        yield from (name for name, _ in module.weight_types())


def _read_by_calls(recording: Recording, component: str) -> frozenset[str]:
    calls = [call for programs in recording.calls for call in programs.values()]
    owned = (weight.partition("/") for call in calls for weight in call.weights)
    return frozenset(name for owner, _, name in owned if owner == component)


def _before(module: Module, read: frozenset[str]) -> frozenset[str]:
    """Returns the weights that preambles read and nothing else; the weights of one block's region stay together."""
    loop = {name: program for name, program in module.programs.items() if not program.ahead}
    ahead = {name: program for name, program in module.programs.items() if program.ahead}
    later = {name for name, _ in replace(module, programs=loop).weight_types()} | read
    before = {name for name, _ in replace(module, programs=ahead).weight_types()} - later
    together = [
        {weight_in(op, name) for name in module.regions[op.attrs["region"]].weights}
        for program in ahead.values()
        for op in program.ops
        if op.name == REGION
    ]
    count = -1
    while count != len(before):
        count = len(before)
        for weights in together:
            before -= weights if not weights <= before else set()
    return frozenset(before)
