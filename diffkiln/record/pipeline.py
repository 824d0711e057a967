"""The whole call of a diffusers pipeline as a program, recorded without weights."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from diffkiln.errors import DataDependent, Problem, RecordError, SpecError
from diffkiln.interpreter.quiet import heard
from diffkiln.models.meta import make_fake
from diffkiln.program import CALL, NOISE, STEP, Builder, Module, Op, Program, Ref, TensorType, owner_of, prune, verify
from diffkiln.program.calls import GIVEN, Given
from diffkiln.program.preambles import loop_regions
from diffkiln.program.text_rules import COUNTED
from diffkiln.record.call import CallRecorder, Failed, Request, Unread, defaults
from diffkiln.record.components import Callee, record_component
from diffkiln.record.constants import Constants
from diffkiln.record.folds import Fold
from diffkiln.record.guidance import free_guidance, source_of
from diffkiln.record.keywords import NEGATIVES, parameters_of
from diffkiln.record.patches import fixed_lengths, outdated
from diffkiln.record.reading import Reading
from diffkiln.record.refusals import Refused

#: The logger by which torch shows the traceback of an operator that refuses its arguments' shapes.
_SHAPES = "torch._subclasses.fake_tensor"


@dataclass(frozen=True)
class Source:
    """The origin of an input of a program at another batch.

    Attributes:
        arg: the place of the argument that it is a part of, or a part of which it is; None for a constant that differs
            from half to half and was folded into the program for both.
        follows: whether it follows the batch; else both have the same.
        half_batches: keys of the constants where there is no argument.
    """

    arg: int | None
    follows: bool
    half_batches: tuple[str, str] | None = None


@dataclass(frozen=True)
class Rebatched:
    """A component's program at another batch than the call has.

    Attributes:
        of: the name of the program that the call has.
        program: the name of the one at twice its batch, or at half of it.
        double: which of the two.
        follows: for each tensor that the component is given, whether it follows the batch.
        inputs: where each input of the program comes from.
        recorded: the component as it was recorded with it.
    """

    of: str
    program: str
    double: bool
    follows: tuple[bool, ...]
    inputs: tuple[Source, ...]
    recorded: Module


@dataclass(frozen=True)
class Recording:
    """The result of recording: the variants' programs by name, the components, and the constants that both use.

    `callees` are the ways in which components are called, by component and program. `reason` says why nothing was
    recorded, where the bundle is to run as diffusers. `fake` is the mode of the meta models' fake tensors. `pipe` is
    the meta model that was recorded for the `requests`, for passes that record a component anew; `batches` are the
    programs that they made so, by component and program. `read` are the parts of the pipeline that the calls read, of
    those that they may not. `folds` give constants that take the weights to be known.
    """

    calls: list[dict[str, Program]]
    modules: dict[str, Module]
    constants: Constants
    fixed: list[dict[str, Any]]
    notices: tuple[str, ...] = ()
    callees: Mapping[tuple[str, str], Callee] = field(default_factory=dict)
    reason: str = ""
    fake: FakeTensorMode = field(default_factory=FakeTensorMode)
    pipe: Any = None
    requests: tuple[Request, ...] = ()
    batches: Mapping[tuple[str, str], Rebatched] = field(default_factory=dict)
    read: frozenset[str] = frozenset()
    folds: tuple[Fold, ...] = ()

    def weight_types(self, held: Collection[str] = ()) -> dict[str, dict[str, TensorType]]:
        """Returns, by component, the weights that programs read and their types.

        The weights of regions of `held` components are left out: their engines have them.
        """
        found = {
            name: dict(module.weight_types(loop_regions(module) if name in held else ()))
            for name, module in self.modules.items()
        }
        for call in (call for calls in self.calls for call in calls.values()):
            for weight in call.weights:
                component, name = owner_of(weight)
                found.setdefault(component, {})[name] = call.types[f"@{weight}"]
        return found


def record(pipe: Any, requests: Sequence[Request], constants: Constants, perhaps: Collection[str] = ()) -> Recording:
    """Records a pipeline's call for every variant, then the components that it calls.

    Args:
        pipe: a meta model, whose weights become fake tensors.
        requests: the variants.
        constants: where folded tensors go.
        perhaps: parts of the pipeline that its call may not read.

    Raises:
        RecordError: the call cannot be written down; DataDependent says which value decides its shape.
    """
    try:
        with fixed_lengths(pipe, any(request.tokens is not None for request in requests)):
            return _record(pipe, requests, constants, Reading(pipe, perhaps))
    except DataDependent as error:
        if names := outdated(pipe):
            raise DataDependent(
                f"{error}. diffkiln records it at a fixed length, but knows another version of {names}"
            ) from error
        raise


def _record(pipe: Any, requests: Sequence[Request], constants: Constants, reading: Reading) -> Recording:
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    for module in pipe.components.values():
        if isinstance(module, torch.nn.Module):
            make_fake(module, fake)
    callees: dict[str, Callee] = {}
    recorder = CallRecorder(pipe, fake, constants, callees, reading)
    with heard(_SHAPES):  # what cannot be recorded is refused below, or tried in another way
        variants = [_record_variant(recorder, request, constants) for request in requests]
    requests = [request for request, _, _ in variants]
    notices = tuple(dict.fromkeys(notice for _, _, each in variants for notice in each))
    calls = [programs for _, programs, _ in variants]
    every = [program for programs in calls for program in programs.values()]
    used = {op.attrs["program"] for program in every for op in program.ops if op.name == CALL}
    callees = {key: callee for key, callee in callees.items() if key in used}
    _find_folded(every, callees, constants)
    modules = _record_components(callees, fake, constants)
    calls = [{name: _link(program, callees) for name, program in programs.items()} for programs in calls]
    for programs in calls:
        for program in programs.values():
            verify(program, modules=modules)
    fixed = [defaults(pipe, request) for request in requests]
    ways = {(callee.component, callee.program): callee for callee in callees.values()}
    return Recording(
        calls,
        modules,
        constants,
        fixed,
        notices,
        ways,
        fake=fake,
        pipe=pipe,
        requests=tuple(requests),
        read=frozenset(reading.read),
    )


def record_once(recording: Recording, request: Request, negative: bool) -> tuple[Program, Mapping[str, Callee]]:
    """Records the recording's pipeline for another request: its call, and its callees by their names in the call.

    The program is only for inspection: its constants are not the recording's, and its components are not recorded.

    Raises:
        RecordError: as `record`.
    """
    callees: dict[str, Callee] = {}
    with fixed_lengths(recording.pipe, request.tokens is not None):
        recorder = CallRecorder(recording.pipe, recording.fake, Constants(), callees)
        return recorder.run(request, {}, negative, None), callees


def _record_variant(
    recorder: CallRecorder, request: Request, constants: Constants
) -> tuple[Request, dict[str, Program], list[str]]:
    """Returns the request as it was recorded; the programs of one variant, by which optional keywords the caller gives:
    "call", "call+latents", …; and what a user should know of them."""
    scale = request.fixed.get("guidance_scale")
    parameters = parameters_of(recorder.pipe)
    negative = "negative_prompt" in parameters and not request.withheld.intersection(NEGATIVES)
    negative = negative and (request.tokens is None or NEGATIVES[0] in request.tokens)
    request, first = _first_counted(recorder, request, negative)

    def once(extra: Mapping[str, Any], negative: bool, latents: TensorType | None = None) -> Program:
        return recorder.run(request, extra, negative, latents)

    def freed(program: Program, negative: bool, latents: TensorType | None = None) -> Program:
        source = source_of(programs["call"]) if programs else None
        free, notice = free_guidance(lambda extra: once(extra, negative, latents), program, scale, constants, source)
        notices.extend([notice] if notice else [])
        return free

    programs: dict[str, Program] = {}
    notices: list[str] = []
    programs["call"] = freed(first, False)
    if negative and not request.needs_negative:
        with contextlib.suppress(Unread):
            programs[Given(negative=True).name] = freed(once({}, True), True)
    if "latents" in parameters and "latents" not in request.tensors:
        for given in [GIVEN[name] for name in programs]:
            program = _first_that_records(partial(once, {}, given.negative), _latents_types(programs["call"]))
            if program is None:
                notices.append(
                    "a caller's own latents are not supported: the call takes them in no shape that it shows"
                )
                break
            latents = next(item.type for item in program.inputs if item.source.get("keyword") == "latents")
            programs[given._replace(latents=True).name] = freed(program, given.negative, latents)
    return request, programs, notices


def _first_counted(recorder: CallRecorder, request: Request, negative: bool) -> tuple[Request, Program]:
    """Makes the first recording of a variant, with the lengths of all texts fixed where the call reads their masks."""
    if request.tokens is None:
        return _first(recorder, request, negative)
    try:
        counted, program = _first(recorder, request, negative)
    except DataDependent:
        with contextlib.suppress(RecordError):
            return _first(recorder, replace(request, all_counted=True), negative)
        raise
    if not _reads_counted(program) and _records(recorder, replace(request, tokens=None), negative):
        reason = "every prompt is padded to a length of its own here, whatever its tokens"
        raise SpecError(problems=[Problem("$.inputs.prompt_tokens", reason, "Remove it.")])
    return counted, program


def _records(recorder: CallRecorder, request: Request, negative: bool) -> bool:
    """Returns True if the request can be recorded."""
    try:
        _first(recorder, request, negative)
    except RecordError:
        return False
    return True


def _reads_counted(program: Program) -> bool:
    """Returns True if the tokens of a text of a fixed length are among what the program takes. The length of one that
    is only measured, as for a warning, may decide nothing."""
    tokens = (item.source for item in program.inputs if item.source.get("kind") == "tokens")
    return any(COUNTED in program.texts[source["text"]] for source in tokens)


def _first(recorder: CallRecorder, request: Request, negative: bool) -> tuple[Request, Program]:
    """Makes the first recording of a variant, with a negative prompt where the pipeline cannot be called without, or
    with arrays as its results where it gives no tensors."""
    try:
        return request, recorder.run(request, {}, False, None)
    except (Failed, Refused):
        if negative:
            needing = replace(request, needs_negative=True)
            with contextlib.suppress(RecordError):
                return needing, recorder.run(needing, {}, True, None)
        arrays = replace(request, output="np")
        with contextlib.suppress(RecordError):
            return arrays, recorder.run(arrays, {}, False, None)
        raise


def _first_that_records(once: Callable[[TensorType], Program], types: Sequence[TensorType]) -> Program | None:
    for type_ in types:
        with contextlib.suppress(RecordError):
            return once(type_)
    return None


def _latents_types(program: Program) -> list[TensorType]:
    """Returns the types that a caller's own `latents` may have: as at the end of a step, or as the noise is drawn."""
    steps = [program.types[op.outputs[0]] for op in program.ops if op.name == STEP]
    noise = [program.types[op.outputs[0]] for op in program.ops if op.name == NOISE]
    return list(dict.fromkeys([*steps[:1], *noise[:1]]))


def _find_folded(programs: Sequence[Program], callees: Mapping[str, Callee], constants: Constants) -> None:
    """Turns arguments that are the same constant in every call of a component into constants of its program."""
    for key, callee in callees.items():
        sites = [op for program in programs for op in program.ops if op.attrs.get("program") == key]
        for index, position in enumerate(callee.tensors):
            values = {op.args[index] for op in sites}
            ref = next(iter(values), None)
            if len(values) == 1 and isinstance(ref, Ref) and ref.is_constant:
                callee.folded[position] = constants.tensors[ref.bare]


def _record_components(callees: Mapping[str, Callee], fake: FakeTensorMode, constants: Constants) -> dict[str, Module]:
    groups: dict[str, list[Callee]] = {}
    for callee in callees.values():
        groups.setdefault(callee.component, []).append(callee)
    return {name: record_component(group, fake, constants) for name, group in groups.items()}


def _link(program: Program, callees: Mapping[str, Callee]) -> Program:
    """Points CALL operations at the recorded component programs, without the arguments that were folded into them."""

    def linked(op: Op) -> Op:
        if op.name != CALL:
            return op
        callee = callees[op.attrs["program"]]
        given = zip(op.args, callee.tensors, strict=True)
        args = tuple(arg for arg, position in given if position not in callee.folded)
        return replace(op, args=args, attrs={"component": callee.component, "program": callee.program})

    return prune(Builder(program).map(linked).build())


__all__ = ["Recording", "record", "record_once"]
