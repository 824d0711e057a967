"""A call's launches as CUDA graphs: each piece of it is recorded once, and then launched as one.

    call ──cut──▶ piece ─▶ host ─▶ piece ─▶ host ─▶ piece

What asks something of the caller stays with the host: noise, which the caller's generator draws, and the end of a
step, where a callback may take the latents' place. Tokenizing comes before the call. All that lies between is a piece.

A graph holds addresses, not tensors. So each value of a call has a place of its own: what the caller and the host give
is copied there, and what a piece leaves there the next one reads. What leaves the call, or is shown to the host, is a
copy. Weights must stay where they are: with offloading they do not, so a spec cannot ask for both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from diffkiln.bundle import Manifest
from diffkiln.errors import CallError, Incompatible
from diffkiln.guards.printable import get_logger
from diffkiln.interpreter.aten import Interpreter, Special
from diffkiln.program import NOISE, STEP, Op, Program, split_off
from diffkiln.runtime.accelerator import CudaCapture

log = get_logger(__name__)

#: For so many choices of a caller's numbers a program's graphs are kept. A service would run out of memory otherwise.
KEPT = 4
#: What one graph spans at most: a denoising step, or all from one draw of noise to the next.
STEPWISE, WHOLE = "step", "program"

Tensors = Sequence[torch.Tensor]
#: Records what a function launches: gives what launches it again, and the tensors in which its results then are.
Capture = Callable[[Callable[[], Tensors]], tuple[Callable[[], object], Tensors]]


class Piece(NamedTuple):
    """A part of a call: a program of what it takes and gives, and whether the host runs it."""

    program: Program
    host: bool


def cut(call: Program, unit: str) -> list[Piece]:
    """A call in pieces, in order: those of the host, of one operation each, and as little as can be between them.

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
    """Runs calls by graphs, which it records when a call comes for the first time.

    Args:
        unit: what one graph spans, "step" or "program".
        capture: records a function; by default a `CudaCapture`, made when it is first needed.
    """

    def __init__(self, unit: str, device: torch.device, capture: Capture | None = None) -> None:
        self.unit, self._device, self._capture = unit, device, capture
        self._calls: dict[tuple[int, tuple[object, ...]], _Call] = {}

    def close(self) -> None:
        """Let go of all that was recorded, and of the memory that it holds."""
        self._calls.clear()
        self._capture = None

    def check(self, with_callback: bool) -> None:
        """Whether a call can be made.

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
    ) -> list[torch.Tensor]:
        """Run a call program; numbers among its inputs are part of what is recorded.

        Args:
            program: a call.
            inputs: tensors on the device, and numbers.
            weights: gives those of the program itself, once.
            constants: by key.
            special: runs the operations that are not ATen's.

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

            self._calls[key] = _Call(program, [(piece, runner(piece)) for piece in cut(program, self.unit)], capture)
        return self._calls[key](inputs)

    def _make_room(self, program: int) -> None:
        """Let go of the graphs of those of a program's numbers that were used longest ago."""
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
    ) -> None:
        self._program, self._pieces, self._capture = program, pieces, capture
        self._places: dict[str, Any] = {}
        self._launches: dict[int, Callable[[], object]] = {}

    def __call__(self, inputs: Sequence[Any]) -> list[torch.Tensor]:
        for item, value in zip(self._program.inputs, inputs, strict=True):
            self._put(item.name, value)
        for index, (piece, run) in enumerate(self._pieces):
            given = [self._places[item.name] for item in piece.program.inputs]
            if piece.host:
                results = run([_copy(value) for value in given])
                for ref, value in zip(piece.program.outputs, results, strict=True):
                    self._put(ref.name, value)
                continue
            if index not in self._launches:
                self._record(index, given)
            self._launches[index]()
        return [_copy(self._places[ref.name]) for ref in self._program.outputs]

    def _put(self, name: str, value: Any) -> None:
        """What a caller or the host gives, into its place."""
        place = self._places.get(name)
        if isinstance(place, torch.Tensor):
            place.copy_(value)
        else:
            self._places[name] = _copy(value)

    def _record(self, index: int, given: Sequence[Any]) -> None:
        piece, run = self._pieces[index]
        try:
            launch, results = self._capture(lambda: run(given))
        except RuntimeError as error:
            cause = _cause(error)
            if isinstance(cause, torch.OutOfMemoryError):
                raise cause from error
            first = str(cause).partition("\n")[0]
            raise Incompatible(
                f"{piece.program.name}: an operation cannot be recorded in a CUDA graph: {first}. Compile without "
                '"cuda_graphs" in "runtime"'
            ) from error
        self._places.update(zip((ref.name for ref in piece.program.outputs), results, strict=True))
        self._launches[index] = launch


def _goes_on(op: Op) -> Callable[..., Tensors]:
    """The end of a step within a graph: nobody is called."""
    return lambda latents: [latents]


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value


def _cause(error: RuntimeError) -> RuntimeError:
    """What went wrong first: what is recorded fails, and then the end of the recording does."""
    while isinstance(error.__context__, RuntimeError):
        error = error.__context__
    return error


def graphs_for(manifest: Manifest, place: torch.device) -> Graphs | None:
    """The graphs that a bundle asks for; None where it asks for none, or runs on a CPU.

    Raises:
        Incompatible: its weights have no fixed places.
    """
    unit: Any = manifest.runtime.get("cuda_graphs")
    if unit is None:
        return None
    if manifest.runtime.get("offload") is not None:
        raise Incompatible(
            "cuda_graphs: found weights that are offloaded, required weights that stay where they are, since a graph "
            "holds their addresses. Compile with one of the two"
        )
    if place.type != "cuda":
        log.warning("no CUDA graphs: the bundle asks for them, and runs on %s", place)
        return None
    return Graphs(unit, place)
