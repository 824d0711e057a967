"""The arithmetic between the calls of a denoiser: guidance, the scheduler's step, what the next call is given.

It becomes a component of its own, `scheduler`, whose programs are regions without weights. What differs from step to
step is handed over, so a solver of one step needs one or two engines, however many steps it makes.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from diffkiln.passes.outlining.segments import Segments, is_number_of
from diffkiln.program import CALL, STEP, Builder, Device, DType, Module, Op, Program, Ref, TensorType, caller_of
from diffkiln.program.schedule import SCHEDULER
from diffkiln.record.constants import Constants
from diffkiln.record.pipeline import Recording

_NUMBER, _KIND = TensorType("float64", ()), {"dtype": DType("float64"), "device": Device()}


def between_calls(recording: Recording) -> Recording:
    """Returns the recording with the scheduler's arithmetic as a component.

    Raises:
        ValueError: there is none that is worth an engine.
    """
    numbers = _Numbers(recording.constants)
    segments = Segments("step", lambda name: (CALL, {"component": SCHEDULER, "program": name}), numbers.lift)
    calls: list[dict[str, Program]] = []
    for programs in recording.calls:
        calls.append({})
        for name, call in programs.items():
            where = _loop(call)
            prepared, where = numbers.as_tensors(call, where)
            calls[-1][name] = segments.outlined(prepared, where, numbers.stays)
    if not segments.regions:
        raise ValueError("nothing between the denoiser's calls is worth an engine")
    programs = {name: caller_of(region) for name, region in segments.regions.items()}
    component = Module(SCHEDULER, programs, segments.regions)
    return replace(recording, calls=calls, modules={**recording.modules, SCHEDULER: component})


def _loop(call: Program) -> range:
    """Returns the range of operations from the denoiser's first call to the end of its last step."""
    sites = [(index, op.attrs["component"]) for index, op in enumerate(call.ops) if op.name == CALL]
    ends = [index for index, op in enumerate(call.ops) if op.name == STEP]
    names = [name for index, name in sites if not ends or index < ends[0]]
    if not names:
        return range(0)
    denoiser = names[-1] if ends else max(names, key=names.count)
    own = [index for index, name in sites if name == denoiser]
    return range(own[0], max([*own, *ends]) + 1)


class _Numbers:
    """The tensors that replace numbers: those of the program become constants, those of a caller inputs."""

    def __init__(self, constants: Constants) -> None:
        self._constants = constants
        self._scalars: tuple[Ref, ...] = ()

    def as_tensors(self, call: Program, where: range) -> tuple[Program, range]:
        """Returns the call with tensors instead of the caller's numbers where the loop allows it, and the loop's new
        range.

        Each tensor has no dimensions.
        """
        edit = Builder(call)
        self._scalars = tuple(item.ref for item in call.inputs if item.source.get("kind") == "scalar")
        made = {
            ref: edit.op("aten.full.default", ((), ref), {f"{ref.name}.tensor": _NUMBER}, _KIND)
            for ref in self._scalars
        }
        read: set[Ref] = set()
        for at in (at for at in where if call.ops[at].is_aten):
            op = call.ops[at]
            swapped = {arg for arg in op.args if isinstance(arg, Ref) and arg in made and _may(edit, op, arg)}
            read |= swapped
            args = (made[arg].results[0] if isinstance(arg, Ref) and arg in swapped else arg for arg in op.args)
            edit.replace(at, replace(op, args=tuple(args)))
        head = [op for ref, op in made.items() if ref in read]
        edit.insert(0, *head)
        return edit.build(), range(where.start + len(head), where.stop + len(head))

    def stays(self, op: Op) -> bool:
        """Returns True if an operation takes a caller's number as a number: an engine takes tensors alone."""
        return any(ref in self._scalars for ref in op.uses)

    def lift(self, edit: Builder, op: Op, number: float) -> Ref | None:
        if not _may(edit, op, number):
            return None
        return edit.constant(self._constants.add(torch.tensor(number, dtype=torch.float64)), _NUMBER)


def _may(edit: Builder, op: Op, number: object) -> bool:
    """Returns True if a tensor without dimensions computes the same as the number.

    That needs another operand that has dimensions and the result's type.
    """
    if not is_number_of(op, number):
        return False
    others = [edit.type_of(arg) for arg in op.args if isinstance(arg, Ref) and arg is not number]
    result = edit.type_of(op.results[0]).dtype
    return "float" in result and any(kind.shape and kind.dtype == result for kind in others)
