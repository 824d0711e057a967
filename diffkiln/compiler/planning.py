"""The memory that a spec's bundle will take: known once the call is recorded, before a weight is read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from diffkiln.bundle.layout import UNUSED
from diffkiln.compiler.packing.programs import variant_names
from diffkiln.compiler.packing.uses import Uses, uses_of
from diffkiln.compiler.packing.weights import groups_of
from diffkiln.compiler.plan import Plan
from diffkiln.errors import IllegalPlan, Problem
from diffkiln.program import CALL, Mesh, Module, Program, owner_of
from diffkiln.program.clocks import Clock, Link, clocks_of
from diffkiln.program.exchange import Exchanged, exchanged
from diffkiln.program.layers import own_call, own_modules, sizes_of
from diffkiln.program.mesh import LAYERS
from diffkiln.program.moments import Groups, Key
from diffkiln.program.planner import AUTO, MAX_MEMORY, STRATEGY, PlannedCall, Planner
from diffkiln.program.residency import TooSmall
from diffkiln.program.work import Ceilings
from diffkiln.program.working import WorkingMemory, working_memory
from diffkiln.runtime.memory import limit_of
from diffkiln.spec import Target

_WHERE = "$.runtime.offload"


@dataclass(frozen=True)
class SharedCall:
    """A call that several processes run together, beside the same call in one process.

    Attributes:
        mesh: the processes.
        call, modules: of each process.
        alone, alone_modules: of one process.
        weights: bytes of each component's weights.
        within: gives the plan of the call in one process, within a limit of memory in bytes.
    """

    mesh: Mesh
    call: Program
    modules: Mapping[str, Module]
    alone: Program
    alone_modules: Mapping[str, Module]
    weights: Mapping[str, int]
    within: Callable[[int], PlannedCall]

    @property
    def held(self) -> tuple[int, ...]:
        """Returns the bytes of weights that each process holds, by rank."""
        return tuple(map(self._held, range(self.mesh.size)))

    def _held(self, rank: int) -> int:
        called = _called(own_call(self.call, rank))
        own = own_modules(self.modules, self.mesh, rank)
        # What stands around the blocks is one file, which is held whole.
        left = sum(_in_blocks(self.modules[name]) - _in_blocks(own[name]) for name in called & self.modules.keys())
        return sum(self.weights.get(name, 0) for name in called) - left

    @property
    def exchanged(self) -> list[Exchanged]:
        """Returns what each process sends in each step, and last after the last step."""
        return exchanged(self.call, self.modules)

    def clocks(self, ceilings: Ceilings, link: Link) -> tuple[Clock, Clock]:
        """Returns the virtual time of one process, and that of the last of several, on devices of these ceilings."""
        (alone,) = clocks_of(self.alone, self.alone_modules, ceilings)
        together = clocks_of(self.call, self.modules, ceilings, self.mesh, link)
        return alone, max(together, key=lambda clock: clock.now)

    def streamed(self, ceilings: Ceilings, memory: int) -> float | None:
        """Returns the least seconds of the call in one process on a device with so much memory, to which weights come
        that it does not hold; None where it does not fit at all."""
        try:
            least = self.within(memory).seconds(ceilings)
        except TooSmall:
            return None
        (alone,) = clocks_of(self.alone, self.alone_modules, ceilings)
        return max(alone.now, least["call"]) if least else None


def is_bounded(plan: Plan) -> bool:
    """Returns True if the spec or a GPU says how much memory a call may take."""
    policy = _policy(plan)
    return (policy is not None and MAX_MEMORY in policy) or any(t.memory_bytes is not None for t in plan.targets)


def check_memory(plan: Plan, working: WorkingMemory | None = None) -> None:
    """Compares what the calls of a recorded plan take with the spec's limit, and with the memory of its GPUs.

    Args:
        plan: recorded, its programs as the passes leave them.
        working: the working memory of a process, which counts once it is known.

    Raises:
        IllegalPlan: a call needs more; says how much, and what would make it fit.
    """
    if problems := tuple(dict.fromkeys(_problems(plan, working))):
        raise IllegalPlan(problems=problems)


def working_of(plan: Plan, rows: Mapping[str, Mapping[str, int]] | None = None) -> WorkingMemory | None:
    """Returns the working memory of a process that makes a plan's calls; None where it is not planned, as on GPUs.

    Args:
        plan: with its targets and the bytes of its weights.
        rows: what was measured, by target; without it the working memory is an estimate.
    """
    if any(target.device != "cpu" for target in plan.targets):
        return None
    return working_memory(sum(plan.bytes_after.values()), rows or {}, torch.get_num_threads())


def planned_calls(plan: Plan, max_memory: str | int | None = None) -> dict[str, dict[str, PlannedCall]]:
    """Returns the plan of each call's memory, by the variant's name and the program's.

    Args:
        plan: recorded, its programs as the passes leave them.
        max_memory: the most memory that a call may take, as bytes or such as "8GiB"; by default what the spec says.

    Returns:
        Of processes that run a range of layers each, the plan of the one that takes the most.

    Raises:
        SpecError: `max_memory` is no amount of memory.
        IllegalPlan: a call needs more.
    """
    policy, working = _policy(plan), working_of(plan)
    if max_memory is not None:
        policy = {**(policy or {}), STRATEGY: AUTO, MAX_MEMORY: limit_of(max_memory)}
    try:
        found = [
            {name: {key: planned(call) for key, call in calls.items()} for name, calls in _calls(plan)}
            for planned in _planners(plan, policy, working)
        ]
    except TooSmall as error:
        raise IllegalPlan(problems=[_too_small(error, working)]) from None
    return {
        name: {key: max((each[name][key] for each in found), key=lambda one: one.residency.peak) for key in calls}
        for name, calls in found[0].items()
    }


def shared_calls(plan: Plan, alone: Plan) -> dict[str, dict[str, SharedCall]]:
    """Returns each call of several processes, by the variant's name and the program's.

    Args:
        plan: recorded, its programs as the passes leave them.
        alone: the same without the passes that share work among processes.
    """
    mesh = Mesh(plan.spec.parallel)

    def within(call: Program, limit: int) -> PlannedCall:
        return _planner(alone, {STRATEGY: AUTO, MAX_MEMORY: limit}, Mesh({}), 0)(call)

    found: dict[str, dict[str, SharedCall]] = {}
    for (name, calls), (_, others) in zip(_calls(plan), _calls(alone), strict=True):
        found[name] = {
            key: SharedCall(
                mesh,
                call,
                plan.recording.modules,
                others[key],
                alone.recording.modules,
                plan.bytes_after,
                partial(within, others[key]),
            )
            for key, call in calls.items()
        }
    return found


def _in_blocks(module: Module) -> int:
    return sum(sizes_of(module).values())


def _called(call: Program) -> set[str]:
    return {op.attrs["component"] for op in call.ops if op.name == CALL}


def _problems(plan: Plan, working: WorkingMemory | None) -> Iterator[Problem]:
    if not is_bounded(plan):
        return
    planners = _planners(plan, _policy(plan), working)
    for name, calls in _calls(plan):
        for call in calls.values():
            try:
                peak = max(planned(call).residency.peak for planned in planners)
            except TooSmall as error:
                yield _too_small(error, working)
                continue
            yield from (_beyond(target, name, peak) for target in plan.targets if _lacks(target, peak))


def _calls(plan: Plan) -> Iterator[tuple[str, Mapping[str, Program]]]:
    return zip(variant_names(plan.requests), plan.recording.calls, strict=False)


def _policy(plan: Plan) -> dict[str, Any] | None:
    """Returns the spec's policy; `auto` without a limit keeps within the smallest GPU."""
    offload = plan.spec.runtime.offload
    if offload is None:
        return None
    sizes = [target.memory_bytes for target in plan.targets if target.memory_bytes is not None]
    smallest = {MAX_MEMORY: min(sizes)} if sizes and offload.strategy == AUTO else {}
    return smallest | offload.model_dump(mode="json", exclude_none=True)


def _planners(
    plan: Plan, policy: Mapping[str, Any] | None, working: WorkingMemory | None
) -> list[Callable[[Program], PlannedCall]]:
    """Returns what plans a call for each range of layers; one for the whole where there are none."""
    mesh = Mesh(plan.spec.parallel)
    return [_planner(plan, policy, mesh, rank, working) for rank in range(mesh.count(LAYERS))]


def _planner(
    plan: Plan, policy: Mapping[str, Any] | None, mesh: Mesh, rank: int, working: WorkingMemory | None = None
) -> Callable[[Program], PlannedCall]:
    recording = plan.recording
    modules = own_modules(recording.modules, mesh, rank)
    parts = {id(call): own_call(call, rank) for listed in recording.calls for call in listed.values()}
    held = frozenset(request.component for request in plan.state.compile if request.holds_weights)
    inside = {(name, region) for name in held & modules.keys() for region in modules[name].regions}
    sizes: dict[Key, int] = {}
    keys: dict[tuple[str, str], Key] = {}
    uses = uses_of(recording, held)
    for name, module in plan.state.modules.items():
        for group, tensors in groups_of(module, plan.spec.runtime.offload, uses.get(name, Uses())).items():
            if group != UNUSED:
                sizes[name, group] = sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())
                keys |= {(name, weight): (name, group) for weight in tensors}
    constants = sum(tensor.numel() * tensor.itemsize for tensor in recording.constants.tensors.values())
    if mesh.count(LAYERS) > 1:
        read = [(name, weight) for name, module in modules.items() for weight, _ in module.weight_types()]
        read += [owner_of(weight) for call in parts.values() for weight in call.weights]
        called = {name for call in parts.values() for name in _called(call)}
        needed = {keys[each] for each in read if each in keys}
        sizes = {key: size for key, size in sizes.items() if key in needed and key[0] in called}
    groups = Groups(modules, lambda component, weight: keys[component, weight], inside)
    planner = Planner(groups, sizes, policy, constants, inside, [*parts.values()], working)
    return lambda call: planner(parts[id(call)])


def _too_small(error: TooSmall, working: WorkingMemory | None) -> Problem:
    hint = "Give that much, or use smaller inputs, tiles of the VAE, or weights in fewer bits."
    besides = f", beside {working}" if working else ""
    return Problem(f"{_WHERE}.{MAX_MEMORY}", f"{error}, most of it {error.where}{besides}", hint)


def _lacks(target: Target, peak: int) -> bool:
    return target.memory_bytes is not None and target.device == "cuda" and peak > target.memory_bytes


def _beyond(target: Target, variant: str, peak: int) -> Problem:
    reason = f"{variant} takes {peak:,} bytes, and {target.name} has {target.memory_bytes:,}"
    return Problem(_WHERE, reason, 'Set it to {"strategy": "auto"}, or use smaller inputs or weights in fewer bits.')
