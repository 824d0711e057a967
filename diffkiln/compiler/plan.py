"""The compiler's one state between stages. A stage takes a plan and returns a new one; no plan is ever changed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from diffkiln.compiler.gates import ReadyGate
from diffkiln.compiler.packed import Packed
from diffkiln.models.source import SourceModel
from diffkiln.passes.base import Pass, State
from diffkiln.passes.manager import Ran
from diffkiln.passes.registry import ListedPass
from diffkiln.record.call import Request
from diffkiln.record.constants import Constants
from diffkiln.record.pipeline import Recording
from diffkiln.spec import Spec, Target


@dataclass(frozen=True)
class Plan:
    """A spec on its way into a bundle.

    Attributes:
        spec, targets: what was asked for, and for which machines.
        source: the model, of which no weight has been read.
        requests: one call for each variant.
        asked: the passes as the spec has them.
        listed: the passes as they run; `calibrate` gives a schedule the steps that the spec leaves open.
        pipe: the pipeline without weights.
        state: its components as the passes leave them.
        report: what each pass does.
        bytes_before, bytes_after: the size of each component's weights, before and after the passes.
        notices: what a user should know, such as components that are left out.
        recording: the programs; empty until the call is recorded.
        packed: what has gone into the bundle.
        gates: the quality that it must keep.
    """

    spec: Spec
    targets: tuple[Target, ...]
    source: SourceModel
    requests: tuple[Request, ...]
    asked: tuple[ListedPass, ...]
    listed: tuple[ListedPass, ...]
    pipe: Any
    state: State
    report: tuple[Ran, ...]
    bytes_before: Mapping[str, int]
    bytes_after: Mapping[str, int]
    notices: tuple[str, ...] = ()
    recording: Recording = field(default_factory=lambda: Recording([], {}, Constants(), []))
    packed: Packed = field(default_factory=Packed)
    gates: tuple[ReadyGate, ...] = ()

    @property
    def dtype(self) -> str | None:
        return self.spec.source.dtype

    @property
    def plan(self) -> State:
        """Returns the state, as it was called in earlier versions."""
        return self.state

    @property
    def compiled(self) -> frozenset[str]:
        """Returns the components that have engines."""
        return frozenset(request.component for request in self.state.compile)

    def noting(self, notices: Iterable[str]) -> Plan:
        """Returns the plan with more notices."""
        return replace(self, notices=(*self.notices, *notices))

    def packing(self, packed: Packed) -> Plan:
        """Returns the plan with more in its bundle, and the notices of what was added."""
        notices = dict.fromkeys((*self.notices, *packed.notices))
        return replace(self, packed=self.packed + packed, notices=tuple(notices))

    def choosing(self, old: ListedPass, step: Pass) -> Plan:
        """Returns the plan with another pass in one place."""
        return self.replacing(old, step, *step.run(self.state).notes)

    def replacing(self, old: ListedPass, step: Pass, *notes: str) -> Plan:
        """Returns the plan with another pass in one place, and these notes on what it does."""
        new = replace(old, step=step)
        listed = tuple(new if item is old else item for item in self.listed)
        report = tuple(replace(ran, listed=new, notes=notes) if ran.listed is old else ran for ran in self.report)
        return replace(self, listed=listed, report=report)
