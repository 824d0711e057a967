"""Graphs on the simulated device: what a piece of a call launches is written down, and launched again from that.

As CUDA does, it refuses what a graph cannot hold: a wait for what was recorded outside of it, a copy on a stream that
has not followed the one that is recorded, and an end that a stream has not come back to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.simulated.device import Event, Simulated, Stream
from tests.simulated.whole import is_view


class Tape:
    """What one piece launched, in order."""

    def __init__(self, device: Simulated) -> None:
        self.device, self.main = device, device.current_stream()
        self.steps: list[Callable[[], None]] = []
        self._following = {self.main}  # streams whose work is a part of the graph
        self._unjoined: set[Stream] = set()
        self._recorded: dict[Event, Event] = {}  # as written down, and as launched again
        self._covers: dict[Event, set[Stream]] = {}

    def record(self, event: Event, stream: Stream) -> None:
        if stream not in self._following:
            return
        self._covers[event] = {stream}

        def again() -> None:
            self._recorded[event] = Event(self.device)
            self._recorded[event].record(stream)

        self.steps.append(again)

    def wait(self, stream: Stream, event: Event) -> None:
        if event not in self._covers:
            if stream in self._following:
                raise RuntimeError("dependency created on uncaptured work in another stream")
            return
        self._following.add(stream)
        if stream is self.main:
            self._unjoined -= self._covers[event]
        self.steps.append(lambda: stream.wait_event(self._recorded[event]))

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        stream = self.device.current_stream()
        if stream not in self._following:
            raise RuntimeError("a copy on a stream that is not captured")
        self._unjoined.add(stream)

        def again() -> None:
            with self.device.on(stream):
                self.device.copy(target, source)

        self.steps.append(again)

    def compute(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], results: Any) -> None:
        def again() -> None:
            self.device.reach(str(func), [leaf for leaf in tree_leaves((args, kwargs)) if _is_tensor(leaf)])
            found = func(*args, **kwargs)
            for own, value in zip(tree_leaves(results), tree_leaves(found), strict=True):
                if _is_tensor(own) and own.data_ptr() != value.data_ptr():
                    own.copy_(value)

        self.steps.append(again)

    def end(self) -> None:
        if self._unjoined:
            raise RuntimeError("unjoined work in a captured stream")

    def launch(self) -> None:
        for again in self.steps:
            again()


class Capture:
    """The recorder of pieces in the place of CUDA's; counts what it recorded and launched."""

    def __init__(self, device: Simulated) -> None:
        self._device = device
        self.recorded = self.launched = 0

    def __call__(self, run: Callable[[], Any], ready: Callable[[], None]) -> tuple[Callable[[], None], Any]:
        ready()
        run()
        ready()
        tape = Tape(self._device)
        with _written(tape), _Computing(tape):
            results = run()
        tape.end()
        for result in results:
            result.fill_(0)  # a recording computes nothing
        self.recorded += 1

        def launch() -> None:
            self.launched += 1
            tape.launch()

        return launch, results


@contextmanager
def _written(tape: Tape) -> Iterator[None]:
    """Writes waits, events and copies down, instead of launching them."""

    def record(event: Event, stream: Any = None) -> None:
        tape.record(event, stream or tape.device.current_stream())

    def copy(target: torch.Tensor, source: torch.Tensor) -> None:
        tape.copy(target, source)

    with (
        mock.patch.object(Event, "record", record),
        mock.patch.object(Stream, "wait_event", lambda stream, event: tape.wait(stream, event)),
        mock.patch.object(tape.device, "copy", copy),
        mock.patch.object(tape.device, "reach"),
    ):
        yield


class _Computing(TorchDispatchMode):
    """Writes down what is computed; it is computed once, with whatever lies in the slots."""

    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self._tape = tape

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        results = func(*args, **(kwargs or {}))
        if not is_view(func, args):
            self._tape.compute(func, args, kwargs or {}, results)
        return results


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)
