"""Runs every recorded call on fake CUDA tensors, so that what a GPU would refuse fails the build.

A CPU lets a program mix tensors of the host and of the device, since both are one. Fake tensors keep places apart
without a GPU. The runtime's own executor runs the call; each component and each region runs once for each set of types.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diffkiln.compiler.decoding import INT_MAX
from diffkiln.compiler.in_memory import InMemory
from diffkiln.errors import VerifyError
from diffkiln.interpreter.aten import Interpreter, dtype_of
from diffkiln.program import ATTENTION, SDPA, Input, Mesh, Op, Program, TensorType
from diffkiln.record.pipeline import Recording
from diffkiln.runtime.executor import Executor
from diffkiln.runtime.graphs import Graphs
from diffkiln.runtime.host_numbers import read_on_host
from diffkiln.runtime.processes import Group, Pretended
from diffkiln.runtime.weights import Key

Run = Callable[..., Sequence[torch.Tensor]]

GPU = torch.device("cuda:0")

#: Operators whose result decides what the host does next, or how large the next tensor is: the host waits for the GPU.
_READS = frozenset({"_local_scalar_dense", "equal", "is_nonzero", "item", "masked_select", "nonzero", "unique_dim"})
_HINT = "Report this with the spec; a target that is a CPU does not need it"


def dry_run(recording: Recording, graphs: str | None = None, parallel: Mapping[str, int] | None = None) -> None:
    """Runs every call of a recording on fake CUDA tensors.

    Args:
        recording: after all passes.
        graphs: what one CUDA graph spans, "step" or "program"; None launches operation by operation.
        parallel: the processes that run each call together, along each axis.

    Raises:
        VerifyError: an operator mixes places, reads a value on the host, or copies from the host; names the operator.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    where = _Where()
    with mode, torch.inference_mode():
        constants = {key: mode.from_tensor(tensor) for key, tensor in recording.constants.tensors.items()}
        executor = _DryExecutor(recording, constants, graphs, where, Pretended(Mesh(parallel), 0) if parallel else None)
        for calls in recording.calls:
            for program in calls.values():
                named = where.named(f"the call {program.name!r}")
                run = named(partial(executor, allow_nan=True))  # no host reads the results
                with _Watch(where):
                    run(program, [_input(item) for item in program.inputs])


class _Where:
    """The work that is running, for messages."""

    def __init__(self) -> None:
        self.program = ""

    def named(self, program: str) -> Callable[[Run], Run]:
        """Gives a function that runs another one, and meanwhile says so."""

        def wrap(run: Run) -> Run:
            def inside(*given: Any) -> Sequence[torch.Tensor]:
                before, self.program = self.program, program
                try:
                    return run(*given)
                finally:
                    self.program = before

            return inside

        return wrap


class _DryExecutor(Executor):
    """The runtime's executor, with weights that have no data, and components and regions that run once."""

    def __init__(
        self,
        recording: Recording,
        constants: Mapping[str, torch.Tensor],
        graphs: str | None,
        where: _Where,
        group: Group | None,
    ) -> None:
        modules, types = recording.modules, recording.weight_types()
        store = InMemory({name: {key: _tensor(kind) for key, kind in own.items()} for name, own in types.items()})
        recorded = Graphs(graphs, GPU, lambda run, _ready: ((lambda: None), run())) if graphs else None
        super().__init__(modules, store, constants, {}, GPU, graphs=recorded, group=group)  # type: ignore[arg-type]
        self.special = {**self.special, ATTENTION: _attention, SDPA: _attention}
        self._where = where
        self._once: dict[tuple[str, str], _Once] = {}
        self.engines = {
            (name, region): _Region(self, program, where.named(f"{name}/{region}"))
            for name, module in modules.items()
            for region, program in module.regions.items()
        }

    def component(self, name: str, program: str) -> Any:
        """Returns the component program, which runs once for each set of types that it is given."""
        if (name, program) not in self._once:
            component = super().component(name, program)
            self._once[name, program] = _Once(self._where.named(f"{name}/{program}")(component), component.schedule)
        return self._once[name, program]


class _Once:
    """A function of tensors that runs once for each set of their types. Later it gives new tensors of those types."""

    def __init__(self, run: Run, schedule: Sequence[Key] = ()) -> None:
        self.schedule = list(schedule)
        self._run = run
        self._made: dict[tuple[Any, ...], list[tuple[Any, ...]]] = {}

    def __call__(self, *given: torch.Tensor) -> list[torch.Tensor]:
        key = tuple(map(_kind, given))
        if key not in self._made:
            self._made[key] = [_kind(tensor) for tensor in self._run(*given)]
        return [
            torch.empty_strided(shape, stride, dtype=dtype, device=device)
            for dtype, shape, stride, device in self._made[key]
        ]


class _Region:
    """A region as the executor takes an engine: replayed once for each set of types."""

    def __init__(self, executor: Executor, region: Program, named: Callable[[Run], Run]) -> None:
        self._executor, self._region = executor, region
        self._replay = Interpreter(read_on_host(region, GPU), GPU, executor.special)
        self._run = _Once(named(self._replayed))

    def __call__(self, flat: list[torch.Tensor]) -> list[torch.Tensor]:
        return self._run(*flat)

    def check(self, flat: Sequence[torch.Tensor]) -> None:
        """Takes whatever there is."""

    def _replayed(self, *flat: torch.Tensor) -> Sequence[torch.Tensor]:
        count = len(self._region.inputs)
        weights = dict(zip(self._region.weights, flat[count:], strict=False))
        return self._replay(flat[:count], weights, self._executor.constants)


class _Watch(TorchDispatchMode):
    """A mode that raises a VerifyError at each operator that a GPU would refuse, or that waits for a GPU or copies to
    one.
    """

    def __init__(self, where: _Where) -> None:
        super().__init__()
        self._where = where

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.partition("::")[2]
        given = [item for item in tree_leaves((args, kwargs)) if isinstance(item, torch.Tensor)]
        if reason := _refuses(name, given):
            raise self._refusal(func, given, reason)
        try:
            # In inference mode fake tensors decompose some operators by code that asks for a real GPU.
            with torch.inference_mode(False):
                result = func(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise self._refusal(func, given, _WAITS) from error
        except UnsupportedOperatorException:
            raise
        except RuntimeError as error:
            raise self._refusal(func, given, str(error).partition("\n")[0]) from error
        made = [item for item in tree_leaves(result) if isinstance(item, torch.Tensor)]
        if reason := _copies(given, made) or _overflows(name, made):
            raise self._refusal(func, given, reason)
        return result

    def _refusal(self, func: Any, given: Sequence[torch.Tensor], reason: str) -> VerifyError:
        shown = ", ".join(f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)} on {t.device}" for t in given)
        return VerifyError(
            f"{self._where.program}: {func} of {shown or 'no tensor'} does not run on a GPU: {reason}. {_HINT}"
        )


_WAITS = "the host waits for a value of the GPU"


def _refuses(name: str, given: Sequence[torch.Tensor]) -> str:
    """Returns why a GPU refuses an operator, or makes the host wait; empty if neither."""
    if name == "_int_mm" and given[0].shape[0] <= 16:
        return "products of int8 need more than 16 rows"
    masked = name in ("index", "index_put", "_unsafe_index") and any(
        item.dtype in (torch.bool, torch.uint8) for item in given[1:]
    )
    if masked:
        return f"an index is a mask, and {_WAITS} to count its elements"
    return _WAITS if name in _READS else ""


def _copies(given: Sequence[torch.Tensor], made: Sequence[torch.Tensor]) -> str:
    """Returns why an operator's tensors are in the wrong place; empty if they are not. Single numbers may be on the
    host.
    """
    if any(item.is_cpu and item.ndim for item in made):
        return "its result is on the host"
    if any(item.is_cpu and item.ndim for item in given):
        return "an argument is on the host"
    if given and all(item.is_cpu for item in given) and any(item.is_cuda for item in made):
        return "it copies from the host"
    return ""


def _overflows(name: str, made: Sequence[torch.Tensor]) -> str:
    """Returns why an operator's result is too large for a GPU's kernel; empty if it is not."""
    if "upsample" in name and any(item.numel() > INT_MAX for item in made):
        return 'its result has more than 2³¹ values. Add a pass "vae" with "tiling", or draw fewer images at once'
    return ""


def _attention(op: Op) -> Callable[..., Sequence[torch.Tensor]]:
    """Gives a tensor of attention's type. Kernels are checked against shapes when the pass is."""

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any, **named: Any) -> list[Any]:
        masks = [item for item in (*rest, named.get("attn_mask")) if isinstance(item, torch.Tensor)]
        for tensor in (key, value, *masks):
            if tensor.device != query.device:
                raise VerifyError(f"attention takes tensors on {query.device} and {tensor.device}. {_HINT}")
        return [query.new_empty((*query.shape[:-1], value.shape[-1]))]

    return attend


def _tensor(kind: TensorType) -> torch.Tensor:
    return torch.empty(kind.shape, dtype=dtype_of(kind.dtype), device=GPU)


def _input(item: Input) -> Any:
    """Returns a stand-in for a caller's argument: a tensor, or a number."""
    return float(item.source["default"]) if item.source.get("kind") == "scalar" else _tensor(item.type)


def _kind(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.device
