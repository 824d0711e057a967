"""The arithmetic between the calls of a denoiser: guidance, the scheduler's step, what the next call is given.

It becomes a component of its own, `scheduler`, whose programs are regions without weights. What differs from step to
step is handed over, so a solver of one step needs one or two engines, however many steps it makes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from diffkiln.passes.outlining.runs import Runs, is_number_of
from diffkiln.passes.outlining.whole import caller_of
from diffkiln.program import CALL, STEP, Device, DType, Module, Op, Program, Ref, TensorType, refs
from diffkiln.record.constants import Constants
from diffkiln.record.pipeline import Recording

SCHEDULER = "scheduler"


def between_calls(recording: Recording) -> Recording:
    """The recording with that arithmetic as a component.

    Raises:
        ValueError: there is none that is worth an engine.
    """
    numbers = _Numbers(recording.constants)
    runs = Runs("step", lambda name, args, results: Op(CALL, args, results, attrs=_program(name)), numbers.lift)
    calls: list[dict[str, Program]] = []
    for programs in recording.calls:
        calls.append({})
        for name, call in programs.items():
            where = _loop(call)
            prepared, where = numbers.as_tensors(call, where)
            calls[-1][name] = runs.outlined(prepared, where, numbers.stays)
    if not runs.regions:
        raise ValueError("nothing between the denoiser's calls is worth an engine")
    programs = {name: caller_of(region) for name, region in runs.regions.items()}
    component = Module(SCHEDULER, programs, runs.regions)
    return replace(recording, calls=calls, modules={**recording.modules, SCHEDULER: component})


def _program(name: str) -> dict[str, str]:
    return {"component": SCHEDULER, "program": name}


def _loop(call: Program) -> range:
    """The operations from the denoiser's first call to its last, and to the end of the step that it is in."""
    sites = [(index, op.attrs["component"]) for index, op in enumerate(call.ops) if op.name == CALL]
    ends = [index for index, op in enumerate(call.ops) if op.name == STEP]
    names = [name for index, name in sites if not ends or index < ends[0]]
    if not names:
        return range(0)
    denoiser = names[-1] if ends else max(names, key=names.count)
    own = [index for index, name in sites if name == denoiser]
    return range(own[0], max([*own, *ends]) + 1)


class _Numbers:
    """Numbers in the place of tensors: those of the program become constants, those of a caller tensors."""

    def __init__(self, constants: Constants) -> None:
        self._constants = constants
        self._scalars: Mapping[str, str] = {}
        self._call: Program | None = None

    def as_tensors(self, call: Program, where: range) -> tuple[Program, range]:
        """The call with a tensor of no dimensions in the place of each number that a caller gives, where operators of
        the loop take one for the other; and where the loop is now."""
        self._call = call
        given = [item.name for item in call.inputs if item.source.get("kind") == "scalar"]
        made = {name: f"{name}.tensor" for name in given}
        types = dict(call.types) | {tensor: TensorType("float64", ()) for tensor in made.values()}
        kind = {"dtype": DType("float64"), "device": Device()}
        head = [Op("aten.full.default", ((), Ref(name)), (tensor,), kind) for name, tensor in made.items()]

        def swapped(op: Op) -> Op:
            args = tuple(
                Ref(made[arg.name]) if isinstance(arg, Ref) and arg.name in made and self._may(op, arg) else arg
                for arg in op.args
            )
            return replace(op, args=args)

        ops = [swapped(op) if index in where and op.is_aten else op for index, op in enumerate(call.ops)]
        used = {ref.name for op in ops for ref in refs(op.args)}
        head = [op for op in head if op.outputs[0] in used]
        self._scalars = dict.fromkeys(given, "")
        moved = range(where.start + len(head), where.stop + len(head))
        self._call = replace(call, ops=(*head, *ops), types=types)
        return self._call, moved

    def stays(self, op: Op) -> bool:
        """Whether an operation takes a caller's number as a number: an engine takes tensors alone."""
        return any(ref.name in self._scalars for ref in refs((op.args, op.kwargs)))

    def lift(self, op: Op, number: float) -> Ref | None:
        if not self._may(op, number):
            return None
        return Ref(f"#{self._constants.add(torch.tensor(number, dtype=torch.float64))}")

    def _may(self, op: Op, number: object) -> bool:
        """Whether a tensor of no dimensions computes the same as the number: beside one with dimensions that has the
        result's type."""
        assert self._call is not None
        if not is_number_of(op, number):
            return False
        types = self._call.types
        others: Sequence[TensorType] = [
            types[arg.name] for arg in op.args if isinstance(arg, Ref) and arg is not number
        ]
        result = types[op.outputs[0]].dtype
        return "float" in result and any(kind.shape and kind.dtype == result for kind in others)
