"""Weights on their way into the bundle: read, transformed by the passes, compared with what was compiled, written.

A small component goes whole. Of a large one a *shard* is in memory at a time: what lies outside of its repeated
blocks, then its blocks, a few at a time, those first that its verification needs. The passes run on a shard as they
run on a meta model, since it is one but for the shard's weights. The files are the same either way.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch

from diffkiln.bundle import BundleWriter
from diffkiln.compiler.folding import Folding
from diffkiln.compiler.memory import return_memory
from diffkiln.compiler.packed import Packed
from diffkiln.compiler.packing import EnginesPacker, Uses, WeightsPacker
from diffkiln.compiler.plan import Plan
from diffkiln.compiler.verify import Verification, check_batches
from diffkiln.errors import PassError
from diffkiln.interpreter.layers import repeated_blocks
from diffkiln.models.borrowing import borrow, borrowed, shares
from diffkiln.models.meta import emptied, load_module, refuse_nonfinite, skeleton
from diffkiln.models.shards import OUTSIDE, Shards, open_shards, unit_of
from diffkiln.models.weights import weights_of
from diffkiln.passes import manager
from diffkiln.passes.base import CompileRequest
from diffkiln.record.pipeline import Recording

#: Components of more bytes than this are streamed. Smaller ones are loaded whole, which is faster.
WHOLE_UP_TO = 2 * 2**30

#: Bytes of blocks, as they are loaded, that are in memory together; a larger block is a shard of its own.
SHARD = 2**28

#: Bytes of a component from which on it is worth the time to give its memory back.
_LARGE = 2**27


@dataclass(frozen=True)
class _Way:
    """The way in which a component comes into memory.

    Attributes:
        shards: the units of each, by the names that the passes leave.
        load: gives the module with data in a shard, before the passes.
        notices: what a user should know of it.
    """

    shards: list[list[str]]
    load: Callable[[Collection[str]], torch.nn.Module]
    notices: tuple[str, ...] = ()


def stream_weights(
    plan: Plan,
    name: str,
    writer: BundleWriter,
    engines: EnginesPacker,
    verification: Verification,
    uses: Uses,
) -> Packed:
    """Writes the weights of one component as the passes leave them, and verifies the component with them.

    Engines that are to hold the component's weights are built while these are in memory.

    Args:
        engines: builds those that are to hold its weights.
        uses: of the component's weights.

    Raises:
        SourceError: its checkpoint cannot be read.
        BuildError: a weight is not finite, or cannot be written.
        PassError: a pass failed, or left something else than it did from configuration alone.
        VerifyError: the component differs from its program.
    """
    meta = plan.state.modules[name]
    needed = verification.blocks_needed(plan.recording, name, meta)
    way = _way(plan, name, needed)
    packed = Packed(notices=way.notices)
    packer = WeightsPacker(writer, name, plan.spec.runtime.offload, uses)
    folding = Folding(plan.recording, name)
    trial = _Trial(name, needed, plan.recording, verification)
    for units in way.shards:
        module = _transformed(way.load(units), name, plan)
        if plan.bytes_before[name] > _LARGE:
            return_memory()
        _same_weights(name, meta, module)
        _have_data(name, module, units)
        trial.add(module, units)
        packer.add(module)
        folding.add(dict(weights_of(module)))
        for request in _holding(plan, name):
            packed += engines.component(request, plan.targets, dict(weights_of(module)))
        del module  # before the next one is loaded
    folding.finish()
    if plan.bytes_before[name] > _LARGE:
        return_memory()
    return packed + packer.packed()


class _Trial:
    """The arguments that the verification of a component needs; it runs once they are there."""

    def __init__(self, name: str, needed: Collection[str], recording: Recording, verification: Verification) -> None:
        self._name, self._recording, self._verification = name, recording, verification
        self._missing = {OUTSIDE, *needed}
        self._module: torch.nn.Module | None = None

    def add(self, module: torch.nn.Module, units: Collection[str]) -> None:
        """Takes the units of a shard; the first one's module is the one that is verified."""
        if not self._missing:
            return
        if self._module is None:
            self._module = module
        for block in self._missing.intersection(units) - {OUTSIDE} if module is not self._module else ():
            self._module.set_submodule(block, module.get_submodule(block))
        self._missing.difference_update(units)
        if not self._missing:
            self._verification.check_component(self._name, self._module)
            check_batches(self._recording, self._name, self._module, self._verification)
            self._module = None


def _way(plan: Plan, name: str, needed: Collection[str]) -> _Way:
    """Returns the way in shards if the component is large; a notice tells of a large one that must come whole."""
    size = plan.bytes_before[name]
    meta = plan.state.modules[name]
    lenders = _lenders(plan, name)
    found: Shards | str = ""
    if size > WHOLE_UP_TO:
        shared = f"it shares weights with {', '.join(lenders)}" if lenders else ""
        found = shared or _needs_all(plan, name) or open_shards(plan.source, name, plan.dtype)
    origins = {} if isinstance(found, str) else _origins(found, plan)
    if isinstance(found, Shards) and not origins:
        found = "a pass replaces its blocks"
    if isinstance(found, Shards):
        return _in_shards(found, origins, needed)
    notices = (f"{name} is loaded whole, {size / 1e9:.1f} GB: {found}",) if found else ()
    units = [OUTSIDE, *(block for block, _ in repeated_blocks(meta))]

    def loaded(_units: Collection[str]) -> torch.nn.Module:
        module = load_module(plan.source, name, plan.dtype)
        for lender in lenders:
            borrow(module, meta, load_module(plan.source, lender, plan.dtype), plan.state.modules[lender])
        return module

    return _Way([units], loaded, notices)


def _lenders(plan: Plan, name: str) -> list[str]:
    """Returns the components whose modules the pipeline gives to this one, which has none in their place."""
    modules = plan.state.modules
    sharing = [key for key, other in modules.items() if key != name and shares(modules[name], other)]
    module = skeleton(plan.source, name, plan.dtype) if sharing else None
    return [key for key in sharing if module is not None and borrowed(module, modules[name], modules[key])]


def _holding(plan: Plan, name: str) -> list[CompileRequest]:
    """Returns the requests for engines that hold this component's weights."""
    return [request for request in plan.state.compile if request.component == name and request.holds_weights]


def _needs_all(plan: Plan, name: str) -> str:
    """Returns why a pass takes the component only as a whole; empty if all take it in shards."""
    if _holding(plan, name):
        return "its engines hold its weights"
    steps = [item.step for item in plan.listed if item.step.component == name]
    return next((f"{step.name} {step.needs_all}" for step in steps if step.needs_all), "")


def _origins(found: Shards, plan: Plan) -> dict[str, str]:
    """Returns the blocks that the passes leave, with their former names; empty if one was no block before."""
    module = emptied(copy.deepcopy(found.module))
    before = repeated_blocks(module)  # held until the end: an id is that of a block that lives
    names = {id(block): block_name for block_name, block in before}
    manager.apply(module, found.name, plan.listed)
    left = {block_name: names.get(id(block), "") for block_name, block in repeated_blocks(module)}
    return left if all(left.values()) else {}


def _in_shards(found: Shards, origins: Mapping[str, str], needed: Collection[str]) -> _Way:
    """Puts the weights outside of blocks, the needed blocks and the others into as few shards as `SHARD` allows."""
    sizes = found.sizes()
    blocks = sorted(origins, key=lambda block: block not in needed)
    shards: list[list[str]] = [[OUTSIDE]]
    room = SHARD - sizes.get(OUTSIDE, 0)
    for block in blocks:
        size = sizes.get(origins[block], 0)
        if size > room:
            shards.append([])
            room = SHARD
        shards[-1].append(block)
        room -= size
    return _Way(shards, lambda units: found.load([origins.get(unit, OUTSIDE) for unit in units]))


def _transformed(module: torch.nn.Module, name: str, plan: Plan) -> torch.nn.Module:
    """Applies the passes and checks that every value is finite."""
    refuse_nonfinite(module, name)
    if manager.apply(module, name, plan.listed):
        refuse_nonfinite(module, name, "after the passes")
    return module


def _same_weights(name: str, meta: torch.nn.Module, module: torch.nn.Module) -> None:
    """Checks that names, shapes and dtypes are those of the meta model: what was compiled is what will run."""
    planned = {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in weights_of(meta)}
    found = {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in weights_of(module)}
    if planned == found:
        return
    key = next(key for key in sorted(planned.keys() | found.keys()) if planned.get(key) != found.get(key))
    raise PassError(
        f"component {name}: the passes left the weight {key} as {found.get(key, 'nothing')}; "
        f"from configuration alone they gave {planned.get(key, 'nothing')}"
    )


def _have_data(name: str, module: torch.nn.Module, units: Collection[str]) -> None:
    """Checks that the passes left no weight of a shard without its data."""
    blocks = [block for block, _ in repeated_blocks(module)]
    for key, tensor in weights_of(module):
        if tensor.is_meta and unit_of(key, blocks) in units:
            raise PassError(
                f"component {name}: the passes left the weight {key} without data. A pass that does nothing where any "
                "weight of the component has none must say so: needs_all"
            )
