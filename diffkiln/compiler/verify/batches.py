"""A component at another batch gives every row what it gives it at its own: proved with its weights.

A pass may have a component recorded anew at twice its batch or at half of it (diffkiln.record.batches). Which arguments
follow the batch is known from the pipeline; that rows do not touch each other is what is tried here, before the bundle
is published.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from diffkiln.compiler.verify.call import Verification
from diffkiln.compiler.verify.comparing import close, difference
from diffkiln.compiler.verify.reduced import in_float32, shrunken
from diffkiln.errors import VerifyError
from diffkiln.interpreter.layers.scaled import row_scales
from diffkiln.record.components import Callee, tracing
from diffkiln.record.patches import fixed_lengths
from diffkiln.record.pipeline import Rebatched, Recording
from diffkiln.record.structure import flatten, unflatten


def check_batches(recording: Recording, name: str, module: torch.nn.Module, verification: Verification) -> None:
    """Compares every program at another batch with the component, and with the program at its own batch.

    The first comparison is bit for bit. The second allows rounding, since kernels add up in another order for another
    batch; it uses a reduced model in float32 with a block of each list.

    Args:
        recording: with the programs, after the passes.
        name: of the component.
        module: with its weights, after all passes.
        verification: knows what the call gave it.

    Raises:
        VerifyError: they differ.
    """
    for (component, program), other in recording.batches.items():
        if component != name:
            continue
        new, old = recording.callees[name, program], recording.callees[name, other.of]
        given = verification.given(name, other.of)
        whole, half_batches = _joined(new, other, given) if other.double else _parted(old, new, other, given[0])
        verification.check_program(new, module, other.recorded, whole if other.double else half_batches[0])
        large, small = (new, old) if other.double else (old, new)
        _compare(module, (large, whole), [(small, half) for half in half_batches], program)


def _joined(new: Callee, other: Rebatched, given: Sequence[list[Any]]) -> tuple[list[Any], list[list[Any]]]:
    """Returns two calls of other prompts, and both in one."""
    first, second = list(given[0]), list(given[-1])
    whole = list(new.leaves)
    positions = [index for index, leaf in enumerate(first) if isinstance(leaf, torch.Tensor)]
    for position, target, follows in zip(positions, new.tensors, other.follows, strict=True):
        if not follows:
            second[position] = first[position]
        whole[target] = torch.cat([first[position], second[position]]) if follows else first[position]
    return whole, [first, second]


def _parted(old: Callee, new: Callee, other: Rebatched, given: list[Any]) -> tuple[list[Any], list[list[Any]]]:
    """Returns one call, and both halves of it."""
    half_batches = [list(given), list(given)]
    for position, follows in zip(old.tensors, other.follows, strict=True):
        if follows:
            for half, rows in zip(half_batches, given[position].chunk(2), strict=True):
                half[position] = rows
    for half in half_batches:
        for position, constant in new.folded.items():
            half[position] = constant
    return given, half_batches


def _compare(
    module: torch.nn.Module,
    whole: tuple[Callee, list[Any]],
    half_batches: Sequence[tuple[Callee, list[Any]]],
    program: str,
) -> None:
    reduced, dtype = in_float32(shrunken(module, in_each_list=True))

    def run(callee: Callee, leaves: list[Any]) -> list[torch.Tensor]:
        cast = [
            leaf.to(dtype) if dtype and isinstance(leaf, torch.Tensor) and leaf.is_floating_point() else leaf
            for leaf in leaves
        ]
        args, kwargs = unflatten(cast, callee.structure)
        with torch.inference_mode(), row_scales(), fixed_lengths(reduced), tracing():
            result = getattr(reduced, callee.method)(*args, **kwargs)
        return [leaf for leaf in flatten(result)[0] if isinstance(leaf, torch.Tensor)]

    together = run(*whole)
    alone = [torch.cat(pair) for pair in zip(*(run(*half) for half in half_batches), strict=True)]
    for index, (want, got) in enumerate(zip(together, alone, strict=True)):
        if not close(want, got):
            raise VerifyError(
                f"component {whole[0].component!r}, program {program!r}: the rows of output {index} are others at "
                f"another batch ({difference(want, got)}): what a row gives depends on the other rows. Remove guidance"
            )
