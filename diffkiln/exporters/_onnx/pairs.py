"""A region's complex numbers as pairs of real ones: the arithmetic of `diffkiln.program.pairs`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from diffkiln.interpreter.aten import Special, overload
from diffkiln.program import Op, Program, Ref
from diffkiln.program.pairs import OPERATORS, PARTS, touches_complex


def paired_arithmetic(region: Program) -> Mapping[str, Special]:
    """Returns the replacements for operators on complex numbers in a region whose complex inputs come as pairs."""

    def chosen(op: Op) -> Callable[..., Sequence[Tensor]]:
        if not touches_complex(op, region):
            run = overload(op.name)
        elif op.name == "aten.mul.Tensor":
            run = _product(op, region)
        else:
            run = _DECOMPOSITIONS[op.name]
        return lambda *args, **named: (run(*args, **named),)

    found = {op.name for op in region.ops if touches_complex(op, region)}
    return dict.fromkeys(found & OPERATORS, chosen)


def _product(op: Op, region: Program) -> Callable[[Tensor, Tensor], Tensor]:
    kinds = [isinstance(arg, Ref) and region.types[arg.name].dtype in PARTS for arg in op.args]

    def run(a: Tensor, b: Tensor) -> Tensor:
        if all(kinds):
            (x, y), (u, v) = a.unbind(-1), b.unbind(-1)
            return torch.stack((x * u - y * v, x * v + y * u), -1)
        real, pair = (b, a) if kinds[0] else (a, b)
        return pair * (real.unsqueeze(-1) if isinstance(real, Tensor) and real.ndim else real)

    return run


def _at(dimension: int) -> int:
    """Returns a complex tensor's dimension as one of its pairs: negative ones move by one."""
    return dimension if dimension >= 0 else dimension - 1


def _same(pair: Tensor) -> Tensor:
    return pair


def _shaped(pair: Tensor, shape: Sequence[int]) -> Tensor:
    return pair.reshape(*shape, 2)


def _part(pair: Tensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> Tensor:
    return torch.ops.aten.slice.Tensor(pair, _at(dim), start, end, step)


_DECOMPOSITIONS: Mapping[str, Callable[..., Tensor]] = {
    "aten.view_as_complex.default": _same,
    "aten.view_as_real.default": _same,
    "aten.resolve_conj.default": _same,
    "aten.contiguous.default": lambda pair, **_: pair.contiguous(),
    "aten.clone.default": lambda pair, **_: pair.clone(),
    "aten.real.default": lambda pair: pair.select(-1, 0),
    "aten.imag.default": lambda pair: pair.select(-1, 1),
    "aten.conj_physical.default": lambda pair: torch.stack((pair.select(-1, 0), -pair.select(-1, 1)), -1),
    "aten.reshape.default": _shaped,
    "aten.view.default": _shaped,
    "aten.expand.default": lambda pair, size, **_: pair.expand(*size, 2),
    "aten.unsqueeze.default": lambda pair, dim: pair.unsqueeze(_at(dim)),
    "aten.transpose.int": lambda pair, a, b: pair.transpose(_at(a), _at(b)),
    "aten.permute.default": lambda pair, dims: pair.permute(*(i % len(dims) for i in dims), len(dims)),
    "aten.slice.Tensor": _part,
    "aten.select.int": lambda pair, dim, index: pair.select(_at(dim), index),
    "aten.cat.default": lambda pairs, dim=0: torch.cat(pairs, _at(dim)),
}
