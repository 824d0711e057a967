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
from diffkiln.program import Arg, Builder, Device, DType, Op, Program, Ref, TensorType, prune

KEYWORD = "guidance_scale"


class _Differs(Exception):
    """An error for two recordings that differ by more than the scale."""


def free_guidance(
    record: Callable[[Mapping[str, Any]], Program],
    program: Program,
    scale: float | None,
    constants: Any,
    source: Mapping[str, Any] | None = None,
) -> tuple[Program, str]:
    """Returns the recorded `program` with the guidance scale as an input where that is exact, and a notice where not.

    Args:
        record: records the call with these keywords changed.
        program: recorded with the variant's own keywords.
        scale: the variant's scale; None when the spec leaves it to the pipeline, which fixes it.
        constants: the recording's constants.
        source: of the input, where it is known from another program of the same variant.
    """
    if scale is None:
        return program, ""
    scale, other = float(scale), float(scale) * 1.25 + 0.5
    try:
        free = _merge(program, record({KEYWORD: other}), (scale, other), constants.tensors)
    except (_Differs, RecordError):
        return program, f"{KEYWORD} is fixed at {scale}: the call depends on it in more than its value"
    if free is None:
        return _with_same(program, record, scale, constants.tensors), ""
    *others, own = free.inputs
    known = source or _source(program, record, scale, constants)
    return Builder(free, inputs=(*others, replace(own, source=known))).build(), ""


def _with_same(
    program: Program,
    record: Callable[[Mapping[str, Any]], Program],
    scale: float,
    constants: Mapping[str, torch.Tensor],
) -> Program:
    """Returns the program of a call that does not read its scale, with the other scales that give the same one.

    Its signature says `same`: the smallest and the largest of them, None where there is none. Where guidance is off
    that is from 0 to 1, as pipelines ask whether the scale is above 1; where nothing asks, any will do.
    """

    def same(other: float) -> bool:
        try:
            return other == scale or _merge(program, record({KEYWORD: other}), (scale, other), constants) is None
        except (_Differs, RecordError):
            return False

    if not (same(0.0) and same(1.0)):
        return program
    unread = same(scale + 7.5)
    if scale > 1.0 and not unread:
        return program
    bounds = (None, None) if unread else (0.0, 1.0)
    return replace(program, signature={**program.signature, "same": {KEYWORD: bounds}})


def source_of(program: Program) -> Mapping[str, Any] | None:
    """Returns where the scale of a program comes from, if it is an input."""
    return next((item.source for item in program.inputs if item.source.get("keyword") == KEYWORD), None)


def _source(program: Program, record: Any, scale: float, constants: Any) -> dict[str, Any]:
    """Returns the input's source. It says "above" where scales of at most 1, which turn guidance off, make another
    program."""
    source = {"kind": "scalar", "keyword": KEYWORD, "default": scale}
    try:
        _merge(program, record({KEYWORD: 1.0}), (scale, 1.0), constants.tensors)
    except (_Differs, RecordError):
        return source | {"above": 1.0}
    return source


def _merge(
    a: Program, b: Program, scales: tuple[float, float], constants: Mapping[str, torch.Tensor]
) -> Program | None:
    """Merges two programs into one, with the scale as an input; returns None if they do not differ at all."""
    if len(a.ops) != len(b.ops) or a.outputs != b.outputs or a.inputs != b.inputs:
        raise _Differs
    merging = _Merging(a, scales, constants)
    for at, (p, q) in enumerate(zip(a.ops, b.ops, strict=True)):
        merging.merge(at, p, q)
    return prune(merging.edit.build()) if merging.used else None


class _Merging:
    """A program that gets the scale as an input.

    Attributes:
        edit: of the program.
        used: whether anything reads the scale.
    """

    def __init__(self, program: Program, scales: tuple[float, float], constants: Mapping[str, torch.Tensor]) -> None:
        self.edit, self.used = Builder(program), False
        self._scale = self.edit.add_input(f"%{KEYWORD}", TensorType("float64", ()))
        self._scales, self._constants = scales, constants
        self._filled: dict[Ref, Ref] = {}

    def merge(self, at: int, p: Op, q: Op) -> None:
        """Puts one operation in the place of two that differ by the scale alone."""
        alike = (p.name, p.outputs, dict(p.attrs)) == (q.name, q.outputs, dict(q.attrs))
        if not alike or p.kwargs.keys() != q.kwargs.keys():
            raise _Differs
        args = tuple(self._merged(x, y) for x, y in zip(p.args, q.args, strict=True))
        kwargs = {key: self._merged(x, q.kwargs[key]) for key, x in p.kwargs.items()}
        self.edit.replace(at, replace(p, args=args, kwargs=kwargs))

    def _merged(self, x: Arg, y: Arg) -> Arg:
        if isinstance(x, tuple) and isinstance(y, tuple) and len(x) == len(y):
            return tuple(self._merged(p, q) for p, q in zip(x, y, strict=True))
        if type(x) is type(y) and x == y:
            return x
        if isinstance(x, (int, float)) and isinstance(y, (int, float)) and (x, y) == self._scales:
            self.used = True
            return self._scale
        if isinstance(x, Ref) and isinstance(y, Ref) and x.is_constant and y.is_constant:
            self.used = True
            return self._full(x, y)
        raise _Differs

    def _full(self, x: Ref, y: Ref) -> Ref:
        """Returns the result of an operation that fills a tensor with the scale, instead of a constant full of it."""
        for ref, scale in zip((x, y), self._scales, strict=True):
            tensor = self._constants[ref.bare]
            if not torch.equal(tensor, torch.full_like(tensor, scale)):
                raise _Differs
        if x not in self._filled:
            type_ = self.edit.type_of(x)
            kind = {"dtype": DType(type_.dtype), "device": Device()}
            result = {f"%scale{len(self._filled)}": type_}
            full = self.edit.op("aten.full.default", (type_.shape, self._scale), result, kind)
            self.edit.insert(0, full)
            (self._filled[x],) = full.results
        return self._filled[x]
