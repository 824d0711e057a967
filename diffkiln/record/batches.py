"""A component at twice its batch, or at half of it: recorded anew from the meta models.

Which of its inputs follow the batch is what the pipeline itself says: it is recorded once more with twice as many
prompts, and an input follows where its first dimension doubles. That a row's result does not depend on the other rows
is not known from that; it is proved with the weights (diffkiln.compiler.verify.batches).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from diffkiln.errors import RecordError
from diffkiln.interpreter.aten import type_of
from diffkiln.interpreter.dtypes import dtype_of
from diffkiln.program import CALL, Builder, Module, Program, TensorType
from diffkiln.program.batches import DOUBLED, HALVED, named_with
from diffkiln.program.calls import GIVEN
from diffkiln.record.components import Callee, record_component
from diffkiln.record.patches import fixed_lengths
from diffkiln.record.pipeline import Rebatched, Recording, Source, record_once
from diffkiln.record.structure import names_of, unflatten


def rebatch(recording: Recording, component: str, *, double: bool) -> tuple[Recording, Mapping[str, Rebatched]]:
    """Records every program of a component at twice its batch, or at half of it.

    Returns:
        The recording with the new programs beside the others, and what they are by the names of the latter.

    Raises:
        RecordError: the pipeline cannot be recorded with twice as many prompts, or the component's arguments or results
            follow their number in another way than by the first dimension.
    """
    grown = _with_twice_the_prompts(recording, component)
    own = [callee for callee in recording.callees.values() if callee.component == component and callee.program in grown]
    follows = {callee.program: _following(callee, grown[callee.program]) for callee in own}
    make = _doubled if double else _halved
    fresh = {callee.program: make(callee, grown[callee.program], follows[callee.program], recording) for callee in own}
    every = [callee for callee in recording.callees.values() if callee.component == component]
    with fixed_lengths(recording.pipe):
        recorded = record_component([*every, *fresh.values()], recording.fake, recording.constants)
    recorded = _at_batch(recorded, fresh, DOUBLED if double else HALVED)
    found = {
        old.program: Rebatched(
            old.program,
            fresh[old.program].program,
            double,
            follows[old.program],
            _sources(old, fresh[old.program], follows[old.program], recording),
            recorded,
        )
        for old in own
    }
    for one in found.values():
        _check_results(recorded.programs[one.of], recorded.programs[one.program], double, component)
    callees = {(component, callee.program): callee for callee in fresh.values()}
    batches = {(component, one.program): one for one in found.values()}
    return replace(
        recording,
        modules={**recording.modules, component: recorded},
        callees={**recording.callees, **callees},
        batches={**recording.batches, **batches},
    ), found


def _with_twice_the_prompts(recording: Recording, component: str) -> dict[str, Callee]:
    """Returns, for every program of the component, how the pipeline calls it there for twice as many prompts."""
    found: dict[str, tuple[str, Callee]] = {}
    for request, programs in zip(recording.requests, recording.calls, strict=True):
        for name, call in programs.items():
            before = _calls(call, component)
            if GIVEN[name].latents or set(before) <= found.keys():
                continue
            program, callees = record_once(recording, request.doubled(), GIVEN[name].negative)
            after = _calls(program, component)
            if len(after) != len(before):
                raise RecordError(
                    f"{component} is called {len(before)} times, and {len(after)} times for twice as many prompts"
                )
            for old, new in zip(before, after, strict=True):
                if found.setdefault(old, (new, callees[new]))[0] != new:
                    raise RecordError(f"for twice as many prompts, calls of {component} that were alike differ")
    return {old: callee for old, (_, callee) in found.items()}


def _calls(program: Program, component: str) -> list[str]:
    return [op.attrs["program"] for op in program.ops if op.name == CALL and op.attrs["component"] == component]


def _following(old: Callee, new: Callee) -> tuple[bool, ...]:
    """Returns, for each tensor of a call, whether its first dimension doubles for twice as many prompts, or nothing
    changes.
    """
    before, after = _types(old), _types(new)
    if len(before) != len(after):
        raise RecordError(
            f"{old.component} is given {len(before)} tensors, and {len(after)} for twice as many prompts: a list of "
            "them is its batch"
        )
    names = _names(old)
    follows: list[bool] = []
    for index, (few, many) in enumerate(zip(before, after, strict=True)):
        if many not in (few, _scaled(few, 2)):
            raise RecordError(
                f"{names[index]} of {old.component} is {few}, and {many} for twice as many prompts: it follows their "
                "number in another way than by its first dimension"
            )
        follows.append(many != few)
    return tuple(follows)


def _scaled(type_: TensorType, factor: int) -> TensorType:
    return replace(type_, shape=tuple(size * (1 if at else factor) for at, size in enumerate(type_.shape)))


def _types(callee: Callee) -> list[TensorType]:
    return [type_of(callee.leaves[position]) for position in callee.tensors]


def _names(callee: Callee) -> list[str]:
    args, kwargs = unflatten(list(callee.leaves), callee.structure)
    names = names_of(callee.original, args, kwargs)
    return [names[position] for position in callee.tensors]


def _doubled(old: Callee, new: Callee, follows: Sequence[bool], recording: Recording) -> Callee:
    """Returns the call for twice as many prompts; folded tensors that follow the batch are doubled."""
    folded: dict[int, torch.Tensor] = {}
    for before, after, grows in zip(old.tensors, new.tensors, follows, strict=True):
        if before in old.folded:
            folded[after] = torch.cat([old.folded[before]] * 2) if grows else old.folded[before]
    return replace(new, folded=folded, program="")


def _halved(old: Callee, new: Callee, follows: Sequence[bool], recording: Recording) -> Callee:
    """Returns the call at half the batch. A constant stays folded if both halves of it are the same."""
    if old.structure != new.structure or _literals(old) != _literals(new):
        raise RecordError(f"{old.component} has arguments besides tensors that follow the number of prompts")
    names = _names(old)
    leaves, folded = list(old.leaves), {}
    for index, (position, grows) in enumerate(zip(old.tensors, follows, strict=True)):
        type_ = type_of(old.leaves[position])
        constant = old.folded.get(position)
        if grows and type_.shape[0] % 2:
            raise RecordError(
                f"{names[index]} of {old.component} is {type_}, which has no halves: it is not a doubled batch"
            )
        if grows:
            shape = (type_.shape[0] // 2, *type_.shape[1:])
            with recording.fake:
                leaves[position] = torch.empty(shape, dtype=dtype_of(type_.dtype))
        if constant is not None and grows:
            first, second = constant.chunk(2)
            constant = first.clone() if torch.equal(first, second) else None
        if constant is not None:
            folded[position] = constant
    return replace(old, leaves=leaves, folded=folded, program="", result=([], None))


def _literals(callee: Callee) -> list[Any]:
    return [leaf for leaf in callee.leaves if not isinstance(leaf, torch.Tensor)]


def _sources(old: Callee, new: Callee, follows: Sequence[bool], recording: Recording) -> tuple[Source, ...]:
    """Returns where the inputs of the new program come from, in their order."""
    given = [position for position in old.tensors if position not in old.folded]
    sources: list[Source] = []
    for before, after, grows in zip(old.tensors, new.tensors, follows, strict=True):
        if after in new.folded:
            continue
        if before in old.folded:
            first, second = old.folded[before].chunk(2)
            keys = recording.constants.add(first), recording.constants.add(second)
            sources.append(Source(None, True, keys))
        else:
            sources.append(Source(given.index(before), grows))
    return tuple(sources)


def _at_batch(module: Module, fresh: Mapping[str, Callee], batch: str) -> Module:
    """Returns the module with the new programs, named after those whose batch they change."""
    programs = dict(module.programs)
    for old, callee in fresh.items():
        program, callee.program = programs.pop(callee.program), named_with(old, batch)
        programs[callee.program] = Builder(program, name=callee.program, batch=batch).build()
    return replace(module, programs=programs)


def _check_results(before: Program, after: Program, double: bool, component: str) -> None:
    """Checks that every result follows the batch."""
    few, many = (before, after) if double else (after, before)
    for one, two in zip(few.outputs, many.outputs, strict=True):
        if not few.types[one.name].shape or many.types[two.name] != _scaled(few.types[one.name], 2):
            raise RecordError(
                f"{component} gives {few.types[one.name]}, and {many.types[two.name]} at twice the batch: its result "
                "does not follow the batch"
            )
