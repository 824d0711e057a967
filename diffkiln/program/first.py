"""Calls of components that the first process alone makes: what its program says, and what is left of it for the others.

The first process runs the whole program. A value that it gives to all stands in a FROM_FIRST operation. The others take
the value there, so what leads to it alone is left out of their program, and they hold no weights for it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace

from diffkiln.program.builder import Builder, prune
from diffkiln.program.ir import CALL, EXCHANGES, FROM_FIRST, NOISE, STEP, Device, DType, Op, Program, Ref, owner_of


def by_first(call: Program, components: Collection[str], count: int) -> Program:
    """Returns a call in which the first process alone runs some components, and gives their results to all.

    Args:
        call: of a pipeline.
        components: those that the first process alone runs.
        count: of all processes.

    Raises:
        ValueError: the call reads weights of such a component itself.
    """
    for weight in call.weights:
        component, name = owner_of(weight)
        if component in components:
            raise ValueError(f"the call reads {name} of {component} itself, so every process needs it")
    edit = Builder(call)
    used = {ref.name for op in call.ops for ref in op.uses} | {ref.name for ref in call.outputs}
    for at, op in enumerate(call.ops):
        if op.name != CALL or op.attrs["component"] not in components:
            continue
        names = [name for name in op.outputs if name in used]
        for name in names:
            edit.rename_result(at, name, f"{name}.first")
        own = dict(zip(op.outputs, edit.ops_at(at)[0].outputs, strict=True))
        given = (Op(FROM_FIRST, (Ref(own[name]),), (name,), attrs={"count": count}) for name in names)
        edit.insert(at + 1, *given)
    return edit.build()


def for_others(call: Program) -> Program:
    """Returns what a process runs of a call that is not the first one."""
    return taken(call, lambda op: op.name == FROM_FIRST)


def taken(program: Program, given: Callable[[Op], bool]) -> Program:
    """Returns what is left of a program for a process that takes some values from another one.

    Exchanges stay, also those whose results this process does not need: all take part in them.

    Args:
        program: a call, or a component's.
        given: whether an operation is one in which the process takes values.
    """
    edit = Builder(program)
    for at, op in enumerate(program.ops):
        if op.name in EXCHANGES and given(op):
            rooms = [_room(edit, name) for name in op.outputs]
            edit.replace(at, *rooms, replace(op, args=tuple(ref for room in rooms for ref in room.results)))
    return prune(edit.build(), kept=(NOISE, STEP, *EXCHANGES))


def _room(edit: Builder, name: str) -> Op:
    """Returns what makes room for a value that comes from another process."""
    type_ = edit.type_of(Ref(name))
    options = {"dtype": DType(type_.dtype), "device": Device()}
    return edit.op("aten.zeros.default", (type_.shape,), {f"{name}.room": type_}, options)
