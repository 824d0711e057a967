"""Reduced models: copies of components with one block of each kind that share their weights; and float32 copies."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from diffkiln.interpreter.layers import repeated_blocks


def kept_blocks(module: torch.nn.Module, in_each_list: bool = False) -> dict[str, torch.nn.Module]:
    """Returns the blocks that a reduced model keeps, by name: the first of each kind, or the first of each kind in each
    list."""
    kept: dict[tuple[type, str], tuple[str, torch.nn.Module]] = {}
    for name, block in repeated_blocks(module):
        kept.setdefault((type(block), name.rpartition(".")[0] if in_each_list else ""), (name, block))
    return dict(kept.values())


def shrunken(module: torch.nn.Module, in_each_list: bool = False) -> torch.nn.Module:
    """Returns a copy that shares the module's weights and keeps one block of each kind, or one in each list."""
    kept = kept_blocks(module, in_each_list)
    gone = {id(block) for name, block in repeated_blocks(module) if name not in kept}
    memo = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    reduced_lists = [
        (name, [child for child in part if id(child) not in gone])
        for name, part in module.named_modules()
        if isinstance(part, torch.nn.ModuleList) and any(id(child) in gone for child in part)
    ]
    for key in gone:
        memo[key] = torch.nn.Module()  # type: ignore[assignment]
    reduced = copy.deepcopy(module, memo)  # type: ignore[arg-type]
    for name, left in reduced_lists:
        home, _, leaf = name.rpartition(".")
        owner = reduced.get_submodule(home)
        before = len(getattr(owner, leaf))
        for count in (own for own, value in vars(owner).items() if own.startswith("num_") and value == before):
            setattr(owner, count, len(left))  # ChatGLM counts its layers itself
        setattr(owner, leaf, torch.nn.ModuleList(memo[id(child)] for child in left))  # type: ignore[misc]
    return reduced


def in_float32(reduced: torch.nn.Module) -> tuple[torch.nn.Module, torch.dtype | None]:
    """Returns a copy of a reduced model in float32, and that type; the reduced model itself and None where its weights
    are not torch's own types.

    Quantized weights become what they stand for: quantized activations would turn rounding into whole steps.
    """
    if {tensor.dtype for tensor in reduced.parameters()} == {torch.float32} and not _quantized(reduced):
        return reduced, torch.float32
    made = copy.deepcopy(reduced)
    for table, key in _quantized(made):
        table[key] = torch.nn.Parameter(table[key].dequantize().float(), requires_grad=False)
    if not {tensor.dtype for tensor in made.parameters()} <= {torch.float32, torch.bfloat16, torch.float16}:
        return reduced, None
    return made.float(), torch.float32


def _quantized(module: torch.nn.Module) -> list[tuple[dict[str, Any], str]]:
    """Returns the places of a module's quantized weights: a table of parameters and the name in it."""
    tables = [part._parameters for part in module.modules()]
    return [(table, key) for table in tables for key, weight in table.items() if is_traceable_wrapper_subclass(weight)]
