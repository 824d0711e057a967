"""Components against their programs: each is run as diffusers runs it and replayed, on what the call gave it.

Whole where its weights are small enough, else as a reduced model; bit for bit. One that is recorded at a fixed length
which diffusers' own has not is compared with itself, too: as diffusers has it, on what diffusers gives it; within
rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from diffkiln.compiler.verify.comparing import close, difference, same
from diffkiln.compiler.verify.reduced import in_float32, shrunken
from diffkiln.errors import VerifyError
from diffkiln.interpreter.aten import Interpreter
from diffkiln.interpreter.layers import repeated_blocks
from diffkiln.interpreter.layers.scaled import row_scales
from diffkiln.models.weights import weights_of
from diffkiln.program import REGION, Module, Op, Program, weight_in
from diffkiln.record.casts import casted
from diffkiln.record.components import Callee, is_plain_call, tracing
from diffkiln.record.marked import Marked
from diffkiln.record.patches import Padding, fixed_lengths, whole
from diffkiln.record.processors import with_hooks, with_processors
from diffkiln.record.settings import with_settings
from diffkiln.record.structure import flatten, unflatten

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Given:
    """The arguments of one call of a component: as diffusers gives them, and as the program's leaves.

    Both are the same if the component is not padded.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    leaves: list[Any]
    padding: Padding | None
    case: int


def compare_component(
    callee: Callee,
    module: torch.nn.Module,
    recorded: Module,
    leaves: Sequence[Any],
    constants: Mapping[str, torch.Tensor],
) -> None:
    """Runs a component as diffusers does, with portable constants, and replays its program on the same arguments.

    Both read the same memory, since some products depend on where their operands lie.

    Raises:
        VerifyError: the results differ in a bit.
    """
    program = recorded.programs[callee.program]
    args, kwargs = unflatten(list(leaves), callee.structure)
    with torch.inference_mode(), row_scales():
        with (
            _as_recorded(callee, module, leaves),
            tracing(),
            with_processors(module, callee.processors),
            with_hooks(module, callee.hooks),
            with_settings(module, callee.settings),
            casted(module, callee.cast),
            _blamed(callee, module),
        ):
            result = getattr(module, callee.method)(*args, **kwargs)
        expected = [leaf for leaf in flatten(result)[0] if isinstance(leaf, torch.Tensor)]
        inputs = [leaves[position] for position in callee.tensors if position not in callee.folded]
        found = replay(recorded, program, dict(weights_of(module)), constants)(inputs)
    for index, (want, got) in enumerate(zip(expected, found, strict=True)):
        if not same(want, got):
            raise VerifyError(
                f"component {callee.component!r}, program {callee.program!r}: output {index} of the replay differs "
                f"from {type(module).__name__}.{callee.method}: {difference(want, got)}"
            )


def compare_lengths(callee: Callee, module: torch.nn.Module, seen: Sequence[Given], counted: bool = False) -> None:
    """Compares a component at the fixed length with the component as diffusers calls it.

    Args:
        callee: the way in which it is called.
        module: with its weights.
        seen: what the call gave it.
        counted: it was recorded for prompts of fixed numbers of tokens.

    Raises:
        VerifyError: what the call uses of the results differs by more than rounding.
    """
    reduced, dtype = in_float32(shrunken(module, in_each_list=True))
    for given in seen:
        args, kwargs = _cast((given.args, given.kwargs), dtype)
        padded = unflatten(_cast(given.leaves, dtype), callee.structure)
        settings = with_settings(reduced, callee.settings)
        with torch.inference_mode(), row_scales(), _blamed(callee, module), settings:
            expected = getattr(reduced, callee.method)(*args, **kwargs)
            with fixed_lengths(reduced, counted), tracing():
                found = getattr(reduced, callee.method)(*padded[0], **padded[1])
        for index, pair in enumerate(zip(_tensors(_counted(expected)), _tensors(found), strict=True)):
            used = given.padding.used if given.padding else whole
            want, got = (used(leaf, args, kwargs) for leaf in pair)
            if not close(want, got):
                raise VerifyError(
                    f"component {callee.component!r} at a fixed length: output {index} differs from "
                    f"{type(module).__name__}.{callee.method} by more than rounding: {difference(want, got)}"
                )


@contextmanager
def _as_recorded(callee: Callee, module: torch.nn.Module, leaves: Sequence[Any]) -> Iterator[None]:
    """Makes the module compute folded values portably, as the recorder did, inside the `with` block."""
    weights = [tensor for _, tensor in weights_of(module)]
    marked = Marked([*weights, *(leaves[index] for index in callee.tensors if index not in callee.folded)])

    def alone(forward: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **kwargs: Any) -> Any:
            if not is_plain_call(args, kwargs):
                return forward(*args, **kwargs)
            with marked.alone([*weights, *_tensors((args, kwargs))]):
                result = forward(*args, **kwargs)
            marked.mark(_tensors(result))
            return result

        return called

    blocks = [] if callee.cast else [block for _, block in repeated_blocks(module)]
    try:
        for block in blocks:
            block.forward = alone(block.forward)
        _forget(module)
        with marked:
            yield
    finally:
        for block in blocks:
            block.__dict__.pop("forward", None)
        _forget(module)


def _forget(module: torch.nn.Module) -> None:
    """Clears what methods remember of earlier calls (`functools.lru_cache`), such as tables of positions."""
    for kind in {type(part) for part in module.modules()}:
        for attribute in vars(kind).values():
            cells = getattr(attribute, "__closure__", None) or ()
            for held in (attribute, *(cell.cell_contents for cell in cells)):
                if callable(clear := getattr(held, "cache_clear", None)):
                    clear()


def _counted(result: Any) -> Any:
    """Replaces a list of truth values by a tensor, which a checker of images gives."""
    if isinstance(result, tuple):
        return tuple(torch.tensor(item) if _is_truths(item) else item for item in result)
    return result


def _is_truths(item: Any) -> bool:
    return isinstance(item, list) and bool(item) and all(isinstance(value, bool) for value in item)


def _cast(nest: Any, dtype: torch.dtype | None) -> Any:
    leaves, structure = flatten(nest)
    return unflatten(
        [
            (leaf.to(dtype) if dtype and leaf.is_floating_point() else leaf).clone()
            if isinstance(leaf, torch.Tensor)  # which a component may write to
            else leaf
            for leaf in leaves
        ],
        structure,
    )


def _tensors(result: Any) -> list[torch.Tensor]:
    return [leaf for leaf in flatten(result)[0] if isinstance(leaf, torch.Tensor)]


@contextmanager
def _blamed(callee: Callee, module: torch.nn.Module) -> Iterator[None]:
    """Turns errors of a component's own code into a VerifyError that names the component and a likely cause."""
    try:
        yield
    except Exception as error:
        who = f"component {callee.component!r} ({type(module).__name__}.{callee.method})"
        raise VerifyError(
            f"{who} fails on what the call gives it: {type(error).__name__}: {error}. The pipeline itself would fail "
            "too. If components are cast to different types, cast those that take each other's results to the same"
        ) from error


def replay(
    recorded: Module, program: Program, weights: Mapping[str, torch.Tensor], constants: Mapping[str, torch.Tensor]
) -> Callable[[Sequence[torch.Tensor]], list[torch.Tensor]]:
    """Returns a component program as a function of its inputs, run on the CPU operation by operation."""

    def region(op: Op) -> Callable[..., Sequence[torch.Tensor]]:
        inner = Interpreter(recorded.regions[op.attrs["region"]], CPU)
        return lambda *inputs: inner(inputs, weights, constants, weight_in(op, ""))

    interpreter = Interpreter(program, CPU, {REGION: region})
    return lambda inputs: interpreter(inputs, weights, constants)
