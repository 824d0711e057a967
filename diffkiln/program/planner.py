"""Plans of memory: what the calls of a bundle take, phase by phase, and which weights stay to keep within a limit.

`max_memory` bounds weights, constants and results, and the working memory of a process on a CPU. What a GPU needs
besides is not counted: its context, and what operators take for themselves.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from diffkiln.program.ir import REGION, Program, weight_in
from diffkiln.program.moments import DENOISE, PHASES, Groups, Key, Moment, moments
from diffkiln.program.operators import nbytes
from diffkiln.program.residency import Residencies, Residency
from diffkiln.program.streaming import Arena
from diffkiln.program.work import Ceilings, Phase, phases_of_work
from diffkiln.program.working import WorkingMemory

#: The policy's fields: how weights move, and the bytes that a call may take.
STRATEGY, MAX_MEMORY, AUTO, STREAM = "strategy", "max_memory", "auto", "stream"


@dataclass(frozen=True)
class Peak:
    """The moment of a phase in which a call takes the most memory. Sizes in bytes."""

    phase: str
    component: str
    weights: int
    results: int
    working: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.results + self.working

    def as_json(self) -> dict[str, Any]:
        """Returns the row as a JSON value; sizes in bytes, without working memory."""
        return {"phase": self.phase, "component": self.component, "weights": self.weights, "results": self.results}


class PlannedCall:
    """One call with its moments and its plan.

    Attributes:
        moments: of the call.
        residency: which weights stay in memory.
        coming: bytes of weights that come in for each moment.
        working: the process's working memory, which every moment has; None where it is not planned.
    """

    def __init__(
        self,
        call: Program,
        groups: Groups,
        listed: list[Moment],
        residency: Residency,
        coming: list[int],
        working: WorkingMemory | None = None,
    ) -> None:
        self.moments, self.residency, self.coming, self.working = listed, residency, coming, working
        self._call, self._groups = call, groups

    @cached_property
    def phases(self) -> tuple[Phase, ...]:
        """Returns the work of each phase."""
        return phases_of_work(self._call, self._groups, self.moments, self.coming, self.residency.ahead)

    def seconds(self, ceilings: Ceilings) -> dict[str, float] | None:
        """Returns the least time of a device, by "call", "step" and the phases' names; None where nothing is known.

        Args:
            ceilings: what the device can do.
        """
        if not ceilings.known:
            return None
        found = {phase.name: phase.seconds(ceilings) for phase in self.phases}
        steps = sum(phase.steps for phase in self.phases)
        step = {"step": found[DENOISE] / steps} if steps and DENOISE in found else {}
        return {"call": sum(found.values()), **found, **step}

    @cached_property
    def rows(self) -> tuple[Peak, ...]:
        """Returns the largest moment of each phase; weights with constants."""
        most: dict[str, Peak] = {}
        working = self.working.nbytes if self.working else 0
        for moment, total in zip(self.moments, self.residency.memory, strict=True):
            row = Peak(moment.phase, moment.component, total - moment.results - working, moment.results, working)
            if moment.phase not in most or row.total > most[moment.phase].total:
                most[moment.phase] = row
        return tuple(most[phase] for phase in PHASES if phase in most)

    def as_json(self) -> dict[str, Any]:
        """Returns the plan as a JSON value; sizes in bytes."""
        return {
            "strategy": self.residency.strategy,
            "peak_bytes": self.residency.peak,
            "weights_brought_bytes": self.residency.brought,
            "working_memory": self.working.as_json() if self.working else None,
            "phases": [row.as_json() for row in self.rows],
            "work": [
                {
                    "phase": phase.name,
                    "steps": phase.steps,
                    "flops": phase.work.total,
                    "bytes": phase.work.nbytes,
                    "weights_brought_bytes": phase.brought,
                }
                for phase in self.phases
            ],
        }


class Planner:
    """The planner of one bundle's calls.

    Args:
        groups: of the weights that its programs use.
        sizes: the bytes of each group.
        policy: how weights are offloaded, as the spec's JSON; None keeps all of them in memory.
        constants: bytes of folded tensors.
        inside: (component, region) of engines that hold their weights themselves.
        calls: all calls of the bundle, which share the slots of weights that stream.
        working: the process's working memory; None where it is not planned.
    """

    def __init__(
        self,
        groups: Groups,
        sizes: Mapping[Key, int],
        policy: Mapping[str, Any] | None,
        constants: int = 0,
        inside: Collection[tuple[str, str]] = (),
        calls: Sequence[Program] = (),
        working: WorkingMemory | None = None,
    ) -> None:
        self._groups, self._policy, self._calls, self.working = groups, policy, calls, working
        held = sum(_held(groups, component, region) for component, region in inside)
        self._residencies = Residencies(sizes, constants + held + (working.nbytes if working else 0))
        self._known: dict[int, tuple[Program, PlannedCall]] = {}
        self._moments: dict[int, list[Moment]] = {}

    def __call__(self, call: Program) -> PlannedCall:
        """Returns the plan of a call.

        Raises:
            TooSmall: no plan keeps within the policy's limit.
        """
        if id(call) not in self._known:
            listed = self._listed(call)
            plan = self._planned(listed)
            coming = self._residencies.coming(listed, plan, self.arena)
            self._known[id(call)] = call, PlannedCall(call, self._groups, listed, plan, coming, self.working)
        return self._known[id(call)][1]

    def residency(self, call: Program) -> Residency:
        """Returns which weights a call keeps in memory. Raises `TooSmall` as `__call__` does."""
        return self(call).residency

    @cached_property
    def arena(self) -> Arena | None:
        """The slots of weights that stream, which all calls share; None where they do not stream.

        Raises:
            TooSmall: no slots keep within the policy's limit.
        """
        policy = self._policy
        if policy is None or policy.get(STRATEGY) != STREAM:
            return None
        return self._residencies.arena([self._listed(call) for call in self._calls], policy.get(MAX_MEMORY))

    def _listed(self, call: Program) -> list[Moment]:
        if id(call) not in self._moments:
            self._moments[id(call)] = moments(call, self._groups)
        return self._moments[id(call)]

    def _planned(self, listed: list[Moment]) -> Residency:
        policy = self._policy
        if policy is None:
            return self._residencies.resident(listed)
        if (arena := self.arena) is not None:
            return self._residencies.stream(listed, arena)
        ahead = bool(policy.get("use_stream", True))
        limit = policy.get(MAX_MEMORY)
        if policy.get(STRATEGY) != AUTO or limit is None:
            return self._residencies.group(listed, ahead)
        return self._residencies.within(listed, limit, ahead)


def _held(groups: Groups, component: str, region: str) -> int:
    """Returns the bytes of weights that an engine holds, of all blocks that it runs."""
    module = groups.modules[component]
    listed = module.regions[region]
    calls = (op for program in module.programs.values() for op in program.ops if op.name == REGION)
    weights = {weight_in(op, name): name for op in calls if op.attrs["region"] == region for name in listed.weights}
    return sum(nbytes(listed.types[f"@{name}"]) for name in weights.values())
