"""Single numbers that arithmetic reads on the host while its other operand is on a GPU.

Torch passes such a number to the kernel by value and does not round it to the tensor's dtype first, as diffusers'
schedulers rely on (`opmath_symmetric_gpu_kernel_with_scalars`, aten/src/ATen/native/cuda/Loops.cuh). Every other
operator reads the number on the device: most refuse tensors in two places, and the rest copy the number at each call.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from diffkiln.program import Builder, Op, Program, Ref

#: Operators that take one operand on the host if it is a single number and the other operand is on the device.
ARITHMETIC = frozenset({"aten.add.Tensor", "aten.sub.Tensor", "aten.mul.Tensor", "aten.div.Tensor"})

_HOST = "host:"


def constants_on(constants: Mapping[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """Returns the constants on the device; on a GPU each single number is on the host too, under a second key."""
    listed = {key: tensor.to(device) for key, tensor in constants.items()}
    if device.type == "cpu":
        return listed
    return listed | {_HOST + key: tensor for key, tensor in constants.items() if tensor.ndim == 0}


def read_on_host(program: Program, device: torch.device) -> Program:
    """Returns the program with the second keys of `constants_on` where arithmetic reads a single number.

    On a CPU the program stays as it is.
    """
    if device.type == "cpu":
        return program
    edit = Builder(program)
    return edit.map(lambda op: _with_number(op, edit) if op.name in ARITHMETIC else op).build()


def _with_number(op: Op, edit: Builder) -> Op:
    """Returns the operation with its number on the host, if exactly one of its operands is a constant of one number."""
    first, second, *rest = op.args
    if not (isinstance(first, Ref) and isinstance(second, Ref)):
        return op
    numbers = [arg for arg in (first, second) if arg.is_constant and not edit.type_of(arg).shape]
    if len(numbers) != 1:
        return op
    here = edit.constant(f"{_HOST}{numbers[0].bare}", edit.type_of(numbers[0]))
    return replace(op, args=(*(here if arg == numbers[0] else arg for arg in (first, second)), *rest))
