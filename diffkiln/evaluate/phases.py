"""The time of one call by its phases: encoding, denoising, decoding, and each step.

Encoding ends where the denoiser is first called, and denoising with the last step. The denoiser is the component that
runs last before the first step's end. A GPU is waited for at each of these moments, so that times are its own.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from diffkiln.program.moments import PHASES
from diffkiln.program.schedule import SCHEDULER
from diffkiln.runtime.accelerator import wait

_CALLBACK = "callback_on_step_end"


@dataclass(frozen=True)
class Timed:
    """One call in seconds. `phases` and `steps` are empty where the call does not show them."""

    total: float
    phases: dict[str, float]
    steps: list[float]


class Stopwatch:
    """Calls a pipeline and takes the times of its phases.

    Args:
        pipe: a bundle's pipeline, or one of diffusers.
    """

    def __init__(self, pipe: Any) -> None:
        self._pipe = pipe
        self.device = torch.device(getattr(pipe, "device", "cpu"))
        self._started: list[tuple[str, float]] = []
        self._steps: list[float] = []

    def call(self, **keywords: Any) -> tuple[Any, Timed]:
        """Returns what the pipeline gives, and the times of the call."""
        self._started, self._steps = [], []
        with ExitStack() as stack:
            stack.enter_context(self._observed())
            if tells_steps(self._pipe):
                keywords = {**keywords, _CALLBACK: self._step}
            begun = self._now()
            result = self._pipe(**keywords)
            ended = self._now()
        return result, self._timed(begun, ended)

    def _timed(self, begun: float, ended: float) -> Timed:
        before = [at for name, at in self._started if self._steps and name == self._denoiser()]
        if not before:
            return Timed(ended - begun, {}, [])
        first, last = before[0], self._steps[-1]
        phases: dict[str, float] = dict(zip(PHASES, (first - begun, last - first, ended - last), strict=True))
        edges = [first, *self._steps]
        return Timed(ended - begun, phases, [later - sooner for sooner, later in pairwise(edges)])

    def _denoiser(self) -> str:
        early = [name for name, at in self._started if at <= self._steps[0] and name != SCHEDULER]
        return early[-1] if early else ""

    def _now(self) -> float:
        wait(self.device)
        return time.perf_counter()

    def _step(self, *_: Any) -> dict[str, Any]:
        self._steps.append(self._now())
        return {}

    @contextmanager
    def _observed(self) -> Iterator[None]:
        """Notes when each component of a call begins."""
        if hasattr(self._pipe, "bundle"):
            self._pipe.executor.observer = self._begin
            try:
                yield
            finally:
                self._pipe.executor.observer = None
            return
        modules = {k: part for k, part in self._pipe.components.items() if isinstance(part, torch.nn.Module)}
        hooks = [part.register_forward_pre_hook(self._hook(name)) for name, part in modules.items()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _hook(self, name: str) -> Any:
        def before(*_: Any) -> None:
            self._started.append((name, self._now()))

        return before

    @contextmanager
    def _begin(self, name: str) -> Iterator[None]:
        self._started.append((name, self._now()))
        yield


def tells_steps(pipe: Any) -> bool:
    """Returns True if a call of the pipeline takes `callback_on_step_end`."""
    if hasattr(pipe, "bundle"):
        return pipe.executor.graphs is None
    return _CALLBACK in inspect.signature(type(pipe).__call__).parameters
