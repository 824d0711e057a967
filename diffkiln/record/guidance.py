"""A guidance scale that callers may change without recompiling.

The call is recorded with two scales. Where the two programs differ by the scale itself (a number that is the scale, a
tensor filled with it), the difference becomes an input; where they differ in any other way the scale stays fixed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from diffkiln.errors import RecordError
from diffkiln.interpreter.aten import dtype_name
from diffkiln.program import Arg, Device, DType, Input, Op, Program, Ref, TensorType, drop_dead

KEYWORD = "guidance_scale"
_NAME = f"%{KEYWORD}"


class _Differs(Exception):
    """The two recordings differ by more than the scale."""


def free_guidance(
    record: Callable[[Mapping[str, Any]], Program],
    program: Program,
    scale: float | None,
    constants: Any,
    notices: list[str],
    source: Mapping[str, Any] | None = None,
) -> Program:
    """The recorded `program`, with the guidance scale as an input where that is exact.

    Args:
        record: records the call with these keywords changed.
        program: recorded with the variant's own keywords.
        scale: the variant's scale; None when the spec leaves it to the pipeline, which fixes it.
        constants: the recording's constants.
        notices: told when the scale stays fixed.
        source: of the input, where it is known from another program of the same variant.
    """
    if scale is None:
        return program
    scale, other = float(scale), float(scale) * 1.25 + 0.5
    try:
        free = _merge(program, record({KEYWORD: other}), (scale, other), constants.tensors)
    except (_Differs, RecordError):
        notice = f"{KEYWORD} is fixed at {scale}: the call depends on it in more than its value"
        if notice not in notices:
            notices.append(notice)
        return program
    if free is None:
        return program
    known = source or _source(program, record, scale, constants)
    return replace(free, inputs=tuple(replace(i, source=known) if i.name == _NAME else i for i in free.inputs))


def source_of(program: Program) -> Mapping[str, Any] | None:
    """Where the scale of a program comes from, if it is an input."""
    return next((item.source for item in program.inputs if item.name == _NAME), None)


def _source(program: Program, record: Any, scale: float, constants: Any) -> dict[str, Any]:
    """The input's source. It says "above" where scales of at most 1, which turn guidance off, make another program."""
    source = {"kind": "scalar", "keyword": KEYWORD, "default": scale}
    try:
        _merge(program, record({KEYWORD: 1.0}), (scale, 1.0), constants.tensors)
    except (_Differs, RecordError):
        return source | {"above": 1.0}
    return source


def _merge(
    a: Program, b: Program, scales: tuple[float, float], constants: Mapping[str, torch.Tensor]
) -> Program | None:
    """One program of two, with the scale as an input; None where they do not differ at all."""
    if len(a.ops) != len(b.ops) or a.outputs != b.outputs or a.inputs != b.inputs:
        raise _Differs
    ops: list[Op] = []
    filled: dict[str, tuple[str, Op]] = {}
    used = False

    def join(x: Arg, y: Arg) -> Arg:
        nonlocal used
        if isinstance(x, tuple) and isinstance(y, tuple) and len(x) == len(y):
            return tuple(join(p, q) for p, q in zip(x, y, strict=True))
        if type(x) is type(y) and x == y:
            return x
        if isinstance(x, (int, float)) and isinstance(y, (int, float)) and (x, y) == scales:
            used = True
            return Ref(_NAME)
        if isinstance(x, Ref) and isinstance(y, Ref) and x.name.startswith("#") and y.name.startswith("#"):
            used = True
            return Ref(_filled(x, y, scales, constants, filled, a).name)
        raise _Differs

    for p, q in zip(a.ops, b.ops, strict=True):
        if (p.name, p.outputs, dict(p.attrs)) != (
            q.name,
            q.outputs,
            dict(q.attrs),
        ) or p.kwargs.keys() != q.kwargs.keys():
            raise _Differs
        args = tuple(join(x, y) for x, y in zip(p.args, q.args, strict=True))
        kwargs = {key: join(x, q.kwargs[key]) for key, x in p.kwargs.items()}
        ops.append(replace(p, args=args, kwargs=kwargs))
    if not used:
        return None
    type_ = TensorType("float64", ())
    types = dict(a.types) | {_NAME: type_} | {op.outputs[0]: a.types[key] for key, op in filled.values()}
    inputs = (*a.inputs, Input(_NAME, type_))
    head = tuple(op for _, op in filled.values())
    return drop_dead(replace(a, inputs=inputs, ops=(*head, *ops), types=types))


def _filled(
    x: Ref,
    y: Ref,
    scales: tuple[float, float],
    constants: Mapping[str, torch.Tensor],
    filled: dict[str, tuple[str, Op]],
    program: Program,
) -> Ref:
    """The result of an operation that fills a tensor with the scale, in place of a constant that is just that."""
    for ref, scale in zip((x, y), scales, strict=True):
        tensor = constants[ref.name[1:]]
        if not torch.equal(tensor, torch.full_like(tensor, scale)):
            raise _Differs
    if x.name not in filled:
        tensor = constants[x.name[1:]]
        name = f"%scale{len(filled)}"
        op = Op(
            "aten.full.default",
            (tuple(tensor.shape), Ref(_NAME)),
            (name,),
            {"dtype": DType(dtype_name(tensor.dtype)), "device": Device()},
        )
        filled[x.name] = (x.name, op)
    return Ref(filled[x.name][1].outputs[0])
