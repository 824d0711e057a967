"""A region replayed in float32, which tells the rounding of a narrower type from a fault."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from diffkiln.interpreter.aten import Interpreter, Special, dtype_of, overload
from diffkiln.interpreter.gpu_decompositions import gpu_decompositions
from diffkiln.program import ATTENTION, SDPA, Builder, DType, Op, Program, Ref

#: Types that are computed in float32 instead. What is stored in fewer bits, such as float8, keeps its type.
NARROW = frozenset({"float16", "bfloat16"})

#: Operators whose arguments must keep their types: the first has rules of its own for its result, and the second reads
#: bits. They run on narrow tensors, and their results become float32.
_TYPED = frozenset({"aten._scaled_mm.default", "aten.view.dtype"})


def is_narrow(region: Program) -> bool:
    """Returns True if a region computes in a type that is narrower than float32."""
    return any(kind.dtype in NARROW for kind in region.types.values())


def replay_in_float32(
    region: Program,
    inputs: Sequence[torch.Tensor],
    weights: Mapping[str, torch.Tensor],
    constants: Mapping[str, torch.Tensor],
    device: torch.device,
) -> list[torch.Tensor]:
    """Replays a region with float32 in the place of every narrow type, on the same values.

    Attention runs by whichever kernel of torch takes float32.
    """
    special: dict[str, Special] = {ATTENTION: _attention, **gpu_decompositions(device)}
    special |= {name: lambda op: _typed(op, region) for name in _TYPED}
    run = Interpreter(Builder(region).map(_in_float32).build(), device, special)
    return run(
        [_widened(tensor) for tensor in inputs],
        {name: _widened(tensor) for name, tensor in weights.items()},
        {key: _widened(tensor) for key, tensor in constants.items()},
    )


def _in_float32(op: Op) -> Op:
    if op.name in _TYPED:
        return op
    kwargs = {key: _literal(arg) for key, arg in op.kwargs.items()}
    return replace(op, args=_literal(op.args), kwargs=kwargs, attrs={} if op.name == SDPA else op.attrs)


def _literal(arg: Any) -> Any:
    if isinstance(arg, DType) and arg.name in NARROW:
        return DType("float32")
    return tuple(map(_literal, arg)) if isinstance(arg, tuple) else arg


def _attention(op: Op) -> Callable[..., Sequence[torch.Tensor]]:
    causal, scale = op.attrs["causal"], op.attrs["scale"]
    return lambda query, key, value: [scaled_dot_product_attention(query, key, value, is_causal=causal, scale=scale)]


def _typed(op: Op, region: Program) -> Callable[..., Sequence[torch.Tensor]]:
    """Returns an operation with the recorded types, and its result in float32."""
    function = overload(op.name)
    dtypes = [dtype_of(region.types[arg.name].dtype) if isinstance(arg, Ref) else None for arg in op.args]
    named = {key: dtype_of(region.types[arg.name].dtype) for key, arg in op.kwargs.items() if isinstance(arg, Ref)}

    def run(*args: Any, **kwargs: Any) -> Sequence[torch.Tensor]:
        given = [arg if dtype is None else arg.to(dtype) for arg, dtype in zip(args, dtypes, strict=True)]
        return [_widened(function(*given, **{k: v.to(named[k]) if k in named else v for k, v in kwargs.items()}))]

    return run


def _widened(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
