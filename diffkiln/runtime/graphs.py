"""A call's launches as CUDA graphs: each piece of it is recorded once, and then launched as one.

    call ──cut──▶ piece ─▶ host ─▶ piece ─▶ host ─▶ piece

What asks something of the caller stays with the host: noise, which the caller's generator draws, and the end of a
step, where a callback may take the latents' place. Tokenizing comes before the call. All that lies between is a piece.

A graph holds addresses, not tensors. So each value of a call has a place of its own: what the caller and the host give
is copied there, and what a piece leaves there the next one reads. What leaves the call, or is shown to the host, is a
copy. Weights must stay where they are, resident or in slots through which they stream; other offloading is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from diffkiln.bundle import Manifest
from diffkiln.errors import CallError, Incompatible
from diffkiln.guards.printable import get_logger
from diffkiln.interpreter.aten import Interpreter, Special
from diffkiln.program import CALL, NOISE, STEP, Op, Program, split_off
from diffkiln.program.planner import STRATEGY, STREAM
from diffkiln.runtime.accelerator import CudaCapture
from diffkiln.runtime.finite import all_finite
from diffkiln.runtime.streaming import Capture, Launch, Recorder, Tensors

log = get_logger(__name__)

#: For so many choices of a caller's numbers a program's graphs are kept. A service would run out of memory otherwise.
KEPT = 4
#: What one graph spans at most: a denoising step, or all from one draw of noise to the next.
STEPWISE, WHOLE = "step", "program"


class Piece(NamedTuple):
    """A part of a call: a program of its arguments and results, and whether the host runs it."""

    program: Program
    host: bool


def cut(call: Program, unit: str) -> list[Piece]:
    """Splits a call into pieces, in order: host pieces of one operation each, and as few pieces as possible between
    them.

    Args:
        call: a call program.
        unit: "step" has the host at the end of each step; "program" at the end of the last one alone, whose latents a
            caller may want.
    """
    ends = [index for index, op in enumerate(call.ops) if op.name == STEP]
    stops = set(ends if unit == STEPWISE else ends[-1:])
    stops |= {index for index, op in enumerate(call.ops) if op.name == NOISE}
    pieces: list[Piece] = []
    start = 0
    for stop in (*sorted(stops), len(call.ops)):
        if start < stop:
            pieces.append(Piece(split_off(call, range(start, stop)), host=False))
        if stop < len(call.ops):
            pieces.append(Piece(split_off(call, [stop]), host=True))
        start = stop + 1
    return pieces


class Graphs:
    """The CUDA graphs of calls, each recorded at the first call.

    Args:
        unit: what one graph spans, "step" or "program".
        capture: records a function; by default a `CudaCapture`, made when it is first needed.
    """

    def __init__(self, unit: str, device: torch.device, capture: Capture | None = None) -> None:
        self.unit, self._device, self._capture = unit, device, capture
        self._calls: dict[tuple[int, tuple[object, ...]], _Call] = {}
        self._running: _Call | None = None

    def close(self) -> None:
        """Releases all recorded graphs and their memory."""
        self._calls.clear()
        self._capture = None

    def check(self, with_callback: bool) -> None:
        """Checks that a call can be made.

        Raises:
            CallError: somebody is to be called at the end of each step, and no step ends outside a graph.
        """
        if with_callback and self.unit == WHOLE:
            raise CallError(
                "callback_on_step_end: all steps are one CUDA graph, and nobody can be called within it. Leave it out, "
                'or compile with "cuda_graphs": "step"'
            )

    def __call__(
        self,
        program: Program,
        inputs: Sequence[Any],
        weights: Callable[[], Mapping[str, torch.Tensor]],
        constants: Mapping[str, torch.Tensor],
        special: Mapping[str, Special],
        stopped: Callable[[], bool] = lambda: False,
        streams: Recorder | None = None,
    ) -> list[torch.Tensor]:
        """Runs a call program; numbers among its inputs are part of the recorded graphs.

        Args:
            program: a call.
            inputs: tensors on the device, and numbers.
            weights: gives those of the program itself, once.
            constants: by key.
            special: runs the operations that are not ATen's.
            stopped: asked at the end of each step: whether no further one is wanted.
            streams: records pieces with the copies of their weights, where they stream.

        Raises:
            Incompatible: an operation cannot be recorded.
        """
        key = id(program), tuple(item for item in inputs if not isinstance(item, torch.Tensor))
        if key in self._calls:
            self._calls[key] = self._calls.pop(key)  # the last to go
        else:
            self._make_room(id(program))
            capture = self._capture = self._capture or CudaCapture(self._device)
            held = weights()

            def runner(piece: Piece) -> Callable[[Sequence[Any]], Tensors]:
                inside = special if piece.host else {**special, STEP: _goes_on}
                run = Interpreter(piece.program, self._device, inside)
                return lambda given: run(given, held, constants)

            pieces = [(piece, runner(piece)) for piece in cut(program, self.unit)]
            self._calls[key] = _Call(program, pieces, capture, streams)
        self._running = self._calls[key]
        try:
            return self._running(inputs, stopped)
        finally:
            self._running = None

    def as_if_last(self, latents: torch.Tensor) -> list[torch.Tensor]:
        """Returns what the call that runs would give if the step that has just ended were its last one.

        Args:
            latents: Of that step.
        """
        return self._running.as_if_last(latents) if self._running is not None else []

    def first_not_finite(self) -> tuple[str, torch.dtype | None]:
        """Returns the components of the first piece of the last call whose results are not finite, and their type."""
        call = next(reversed(self._calls.values()), None)
        return call.first_not_finite() if call is not None else ("", None)

    def _make_room(self, program: int) -> None:
        """Releases a program's graphs for the numbers that were used longest ago."""
        recorded = [key for key in self._calls if key[0] == program]
        for key in recorded[: 1 - KEPT]:
            del self._calls[key]


class _Call:
    """One call for the same numbers. Each of its values is always in the same place."""

    def __init__(
        self,
        program: Program,
        pieces: Sequence[tuple[Piece, Callable[[Sequence[Any]], Tensors]]],
        capture: Capture,
        streams: Recorder | None,
    ) -> None:
        self._program, self._pieces, self._capture, self._streams = program, pieces, capture, streams
        self._buffers: dict[str, Any] = {}
        self._launches: dict[int, Callable[[], object]] = {}

    def __call__(self, inputs: Sequence[Any], stopped: Callable[[], bool]) -> list[torch.Tensor]:
        for item, value in zip(self._program.inputs, inputs, strict=True):
            self._put(item.name, value)
        resumed = 0
        for index, (piece, _) in enumerate(self._pieces):
            if index < resumed:
                continue
            if not piece.host:
                self._launch(index)
                continue
            results = self._on_host(index)
            if piece.program.ops[0].name == STEP and stopped():
                resumed = self._after_steps(results[0])
        return self._results()

    def as_if_last(self, latents: torch.Tensor) -> list[torch.Tensor]:
        """Does as `Graphs.as_if_last`. What follows the steps has places of its own, filled again at the end."""
        for index in range(self._after_steps(latents), len(self._pieces)):
            if self._pieces[index][0].host:
                self._on_host(index)
            else:
                self._launch(index)
        return self._results()

    def first_not_finite(self) -> tuple[str, torch.dtype | None]:
        """Does as `Graphs.first_not_finite`."""
        for piece, _ in self._pieces:
            values = [self._buffers.get(ref.name) for ref in piece.program.outputs]
            wrong = [value for value in values if isinstance(value, torch.Tensor) and not all_finite([value])]
            names = dict.fromkeys(op.attrs["component"] for op in piece.program.ops if op.name == CALL)
            if wrong and names:
                return " or ".join(names), wrong[0].dtype
        return "", None

    def _results(self) -> list[torch.Tensor]:
        return [_copy(self._buffers[ref.name]) for ref in self._program.outputs]

    def _given(self, piece: Piece) -> list[Any]:
        return [self._buffers[item.name] for item in piece.program.inputs]

    def _on_host(self, index: int) -> Tensors:
        """Runs a piece of the host; returns its results."""
        piece, run = self._pieces[index]
        results = run([_copy(value) for value in self._given(piece)])
        for ref, value in zip(piece.program.outputs, results, strict=True):
            self._put(ref.name, value)
        return results

    def _launch(self, index: int) -> None:
        """Launches a piece, which is recorded first if it never ran."""
        if index not in self._launches:
            self._record(index, self._given(self._pieces[index][0]))
        self._launches[index]()

    def _after_steps(self, latents: Any) -> int:
        """Returns the piece after the last step, which goes on from these latents."""
        last = max(index for index, (piece, _) in enumerate(self._pieces) if piece.program.ops[0].name == STEP)
        self._put(self._pieces[last][0].program.outputs[0].name, latents)
        return last + 1

    def _put(self, name: str, value: Any) -> None:
        """Copies a value of the caller or the host into its place."""
        own = self._buffers.get(name)
        if isinstance(own, torch.Tensor):
            own.copy_(value)
        else:
            self._buffers[name] = _copy(value)

    def _captured(self, index: int, run: Callable[[], Tensors]) -> tuple[Launch, Tensors]:
        if self._streams is None:
            return self._capture(run, _nothing)
        position = sum(self._streams.uses(piece.program.ops) for piece, _ in self._pieces[:index])
        return self._streams(position, run, self._capture)

    def _record(self, index: int, given: Sequence[Any]) -> None:
        piece, run = self._pieces[index]
        try:
            launch, results = self._captured(index, lambda: run(given))
        except RuntimeError as error:
            cause = _cause(error)
            if isinstance(cause, torch.OutOfMemoryError):
                raise cause from error
            first = str(cause).partition("\n")[0]
            raise Incompatible(
                f"{piece.program.name}: an operation cannot be recorded in a CUDA graph: {first}. Compile without "
                '"cuda_graphs" in "runtime"'
            ) from error
        self._buffers.update(zip((ref.name for ref in piece.program.outputs), results, strict=True))
        self._launches[index] = launch


def _nothing() -> None:
    """Stands for what need not be done."""


def _goes_on(op: Op) -> Callable[..., Tensors]:
    """Returns the end of a step within a graph, where nobody is called."""
    return lambda latents: [latents]


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value


def _cause(error: RuntimeError) -> RuntimeError:
    """Returns the first error: a failed operation makes the end of the recording fail too."""
    while isinstance(error.__context__, RuntimeError):
        error = error.__context__
    return error


def graphs_for(manifest: Manifest, device: torch.device) -> Graphs | None:
    """Returns the graphs that a bundle asks for; None if it asks for none, or runs on a CPU."""
    unit: Any = manifest.runtime.get("cuda_graphs")
    if unit is None:
        return None
    if device.type != "cuda":
        log.warning("no CUDA graphs: the bundle asks for them, and runs on %s", device)
        return None
    return Graphs(unit, device)


def check_addresses(graphs: Graphs | None, offload: Mapping[str, Any] | None) -> None:
    """Raises `Incompatible` for graphs of weights that are offloaded, but for those that stream from the host."""
    streams = offload is not None and offload.get(STRATEGY) == STREAM and offload.get("to") != "disk"
    if graphs is not None and offload is not None and not streams:
        raise Incompatible(
            "cuda_graphs: found weights that are offloaded, required weights that stay where they are, since a graph "
            "holds their addresses. Compile with one of the two, with the strategy stream, or give more memory"
        )
