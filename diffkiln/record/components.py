"""Components, one level down: the recorder on a module without weights, with its repeated blocks kept as calls."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils._python_dispatch import _disable_current_modes

from diffkiln.errors import DataDependent, RecordError
from diffkiln.interpreter.aten import type_of
from diffkiln.interpreter.layers import repeated_blocks
from diffkiln.interpreter.portable import portable
from diffkiln.models.weights import weights_of
from diffkiln.program import REGION, Module, Program, Ref, fingerprint, refs, verify_module
from diffkiln.record.casts import casted
from diffkiln.record.constants import Constants
from diffkiln.record.counted import ByPosition
from diffkiln.record.flex import dense_flex_attention
from diffkiln.record.processors import with_hooks, with_processors
from diffkiln.record.settings import Settings, with_settings
from diffkiln.record.structural_key import OncePerStructure
from diffkiln.record.structure import describe, flatten, key_of, names_of, unflatten
from diffkiln.record.tape import Tape

_AS_IT_IS = contextlib.nullcontext()


@dataclass
class Callee:
    """One way in which a call uses a component: the method, the types of the arguments, and the result."""

    component: str
    method: str
    module: torch.nn.Module
    original: Callable[..., Any]
    leaves: list[Any]
    structure: Any
    result: tuple[list[Any], Any]
    program: str = ""
    folded: dict[int, torch.Tensor] = field(default_factory=dict)  # tensor leaf → the constant that it always is
    processors: Mapping[str, Any] = field(default_factory=dict)  # attention → the processor that the call gives it
    hooks: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)  # path → those that the call gives it
    cast: torch.dtype | None = None  # the type that the call casts the component to before
    settings: Settings = ()  # plain attributes of parts that the call sets before
    decided: Mapping[int, torch.Tensor] = field(
        default_factory=dict
    )  # tensor leaf → its value, which picks the program

    @property
    def key(self) -> str:
        return call_key(self.component, self.method, self.leaves, self.structure, self.cast, self.settings)

    @property
    def tensors(self) -> list[int]:
        """Returns the positions of the tensor leaves."""
        return [index for index, leaf in enumerate(self.leaves) if isinstance(leaf, torch.Tensor)]

    def takes(self, leaves: Sequence[Any]) -> bool:
        """Returns True if these arguments, of the same types, have the values that pick this program."""
        return all(torch.equal(leaves[position], value) for position, value in self.decided.items())


def call_key(
    component: str,
    method: str,
    leaves: list[Any],
    structure: Any,
    cast: torch.dtype | None,
    settings: Settings = (),
) -> str:
    """Returns a key that is equal for two calls that share one program."""
    return f"{component}.{method}|{cast or ''}{settings or ''}|{key_of(leaves, structure)}"


def run_shapes(
    module: torch.nn.Module,
    original: Callable[..., Any],
    leaves: list[Any],
    structure: Any,
    tape: Tape,
    what: str,
    decided: Mapping[int, torch.Tensor] | None = None,
) -> tuple[list[Any], Any]:
    """Returns a component's flattened result for arguments of these shapes, with marked tensors.

    Nothing is computed but what follows from `decided`, the arguments whose values are known, by their places. Only one
    of several alike blocks is run.

    Raises:
        DataDependent: the component decides a shape by a value; `what` names it.
    """
    with _disable_current_modes():
        inputs = [tape.blank(type_of(leaf)) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        for position, value in (decided or {}).items():
            inputs[position] = value
        args, kwargs = unflatten(inputs, structure)
        try:
            # Some make tables when they are first called, and keep them.
            with tracing(), portable(), _first_of_alike(module, tape), ByPosition() if decided else _AS_IT_IS:
                return flatten(original(*args, **kwargs))
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise DataDependent(
                f"{what} reads a value that depends on the request ({error.func}), so its shape or its control flow "
                "may change with the prompt"
            ) from None


@contextlib.contextmanager
def _first_of_alike(module: torch.nn.Module, tape: Tape) -> Iterator[None]:
    """Makes a block that is like an earlier one give tensors of the same types, inside the `with` block."""
    blocks = [block for _, block in repeated_blocks(module)]
    results: OncePerStructure[tuple[list[Any], Any]] = OncePerStructure(blocks)

    def shortened(block: torch.nn.Module, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if not is_plain_call(args, kwargs):
                return original(*args, **kwargs)
            key = key_of(*flatten((args, kwargs)))
            result, shape = results.get(block, key, lambda: flatten(original(*args, **kwargs)))
            fresh = [tape.blank(type_of(leaf)) if isinstance(leaf, torch.Tensor) else leaf for leaf in result]
            return unflatten(fresh, shape)

        return forward

    try:
        for block in blocks:
            block.forward = shortened(block, block.forward)
        yield
    finally:
        for block in blocks:
            block.__dict__.pop("forward", None)


def record_component(
    callees: Sequence[Callee], fake: FakeTensorMode, constants: Constants, regions: bool = True
) -> Module:
    """Records every way in which one component is called.

    Args:
        callees: of one component; each gets its `program` name set.
        fake: the mode of the meta model's weights.
        constants: where folded tensors go.
        regions: keep the repeated blocks as calls.

    Raises:
        RecordError: with the line of the model's code where recording stopped.
    """
    first = callees[0]
    if any(callee.processors != first.processors for callee in callees):
        raise RecordError(f"the call gives {first.component!r} other attention processors from step to step")
    programs: dict[str, Program] = {}
    with with_processors(first.module, first.processors):
        table = _Regions(first.component, first.module, fake, constants, regions)
        # Those that the component is loaded for come first: as diffusers, a block takes the first engine that fits.
        for callee in sorted(callees, key=lambda callee: bool(callee.settings)):
            base = first.component if callee.method == "forward" else f"{first.component}.{callee.method}"
            callee.program = base if base not in programs else f"{base}-{len(programs) + 1}"
            programs[callee.program] = _record_one(callee, table, fake, constants)
    module = Module(first.component, programs, table.programs)
    verify_module(module)
    return module


def _record_one(callee: Callee, table: _Regions, fake: FakeTensorMode, constants: Constants) -> Program:
    what = f"component {callee.component!r} ({type(callee.module).__name__}.{callee.method})"
    tape = Tape(fake, constants, weights_of(callee.module), what)
    args, kwargs = unflatten(list(callee.leaves), callee.structure)
    names = names_of(callee.original, args, kwargs)
    leaves = list(callee.leaves)
    for position in callee.tensors:
        if position in callee.folded:
            leaves[position] = callee.folded[position]
        else:
            leaves[position] = tape.new_input(names[position], type_of(leaves[position]))
    args, kwargs = unflatten(leaves, callee.structure)
    # The blocks of a component that is cast are no regions: their weights are results of the program's own casts.
    regions = contextlib.nullcontext() if callee.cast else table.patched(tape, callee.settings)
    hooks, settings = with_hooks(callee.module, callee.hooks), with_settings(callee.module, callee.settings)
    with torch.inference_mode(), regions, tracing(), hooks, settings, tape, casted(callee.module, callee.cast):
        result = callee.original(*args, **kwargs)
    outputs = [leaf for leaf in flatten(result)[0] if isinstance(leaf, torch.Tensor)]
    return tape.finish(callee.program, outputs)


class _Regions:
    """The repeated blocks of one component while it is being recorded, and the distinct programs among them."""

    def __init__(
        self, component: str, module: torch.nn.Module, fake: FakeTensorMode, constants: Constants, wanted: bool
    ) -> None:
        self.component, self.fake, self.constants = component, fake, constants
        self.blocks = repeated_blocks(module) if wanted else []
        self.programs: dict[str, Program] = {}
        self._by_print: dict[str, str] = {}
        self._results: OncePerStructure[tuple[str, list[Any], Any]] = OncePerStructure(
            block for _, block in self.blocks
        )

    @contextlib.contextmanager
    def patched(self, tape: Tape, settings: Settings = ()) -> Iterator[None]:
        """Makes calls of a block write one REGION operation to the tape, inside the `with` block."""
        try:
            for name, block in self.blocks:
                block.forward = self._stand_in(tape, name, block, block.forward, settings)
            yield
        finally:
            for _, block in self.blocks:
                block.__dict__.pop("forward", None)

    def _stand_in(
        self, tape: Tape, name: str, block: torch.nn.Module, original: Callable[..., Any], settings: Settings
    ) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            given, structure = flatten((args, kwargs))
            with _disable_current_modes():
                leaves = [_decided(leaf, tape) for leaf in given]
            if not is_plain_call(args, kwargs):
                return original(*args, **kwargs)
            region, result, shape = self._results.get(
                block,
                (key_of(leaves, structure), _within(name, settings)),
                lambda: self._record(name, block, original, leaves, structure),
            )
            fresh = [tape.blank(type_of(leaf)) if isinstance(leaf, torch.Tensor) else leaf for leaf in result]
            tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
            outputs = [leaf for leaf in fresh if isinstance(leaf, torch.Tensor)]
            with _disable_current_modes():
                arguments = [tape.value(tensor) for tensor in tensors]
            tape.emit(REGION, arguments, outputs, attrs={"region": region, "instance": name})
            return unflatten(fresh, shape)

        return forward

    def _record(
        self, name: str, block: torch.nn.Module, original: Callable[..., Any], leaves: list[Any], structure: Any
    ) -> tuple[str, list[Any], Any]:
        what = f"region {name!r} ({type(block).__name__}) of component {self.component!r}"
        tape = Tape(self.fake, self.constants, weights_of(block), what)
        args, kwargs = unflatten(leaves, structure)
        names = names_of(original, args, kwargs)
        marked = [
            tape.new_input(names[index], type_of(leaf)) if isinstance(leaf, torch.Tensor) else leaf
            for index, leaf in enumerate(leaves)
        ]
        args, kwargs = unflatten(marked, structure)
        with _disable_current_modes(), tape:
            returned = original(*args, **kwargs)
        result, shape = flatten(returned)
        outputs = [leaf for leaf in result if isinstance(leaf, torch.Tensor)]

        def ref(tensor: torch.Tensor) -> Ref:
            with _disable_current_modes():
                return next(refs(tape.value(tensor)))

        signature = {
            "args": describe(args, ref, what),
            "kwargs": describe(kwargs, ref, what),
            "result": describe(returned, ref, what),
        }
        with _disable_current_modes():
            program = tape.finish("", outputs, signature=signature)
        return self._name(type(block).__name__, program), result, shape

    def _name(self, class_name: str, program: Program) -> str:
        """Returns the name of the region; blocks that compute the same share one."""
        mark = fingerprint(program)
        if mark not in self._by_print:
            count = sum(region.recorded_from == class_name for region in self.programs.values())
            name = class_name if not count else f"{class_name}-{count + 1}"
            self._by_print[mark] = name
            self.programs[name] = replace(program, name=name, recorded_from=class_name)
        return self._by_print[mark]


def _decided(leaf: Any, tape: Tape) -> Any:
    """Returns a block's argument, a Python boolean for a tensor of one whose value no request changes.

    LTX-2 asks of such a tensor whether its guidance perturbs everything, to go one way or another through a block.
    """
    if not isinstance(leaf, torch.Tensor) or leaf.dtype != torch.bool or leaf.ndim or tape.is_marked(leaf):
        return leaf
    return bool(leaf)


def _within(block: str, settings: Settings) -> Settings:
    """Returns the settings of a block's parts, by their paths within it."""
    start = f"{block}."
    inside = (each for each in settings if f"{each[0]}.".startswith(start))
    return tuple((path[len(start) :], name, value) for path, name, value in inside)


def is_plain_call(args: Any, kwargs: Any) -> bool:
    """Returns True if a block is called with tensors and literals alone.

    A block that shares an object with others, such as a cache of keys and values, is part of its component and not a
    region.
    """
    try:
        describe((args, kwargs), lambda _: None, "")
    except RecordError:
        return False
    return True


@contextlib.contextmanager
def tracing() -> Iterator[None]:
    """Keeps transformers from reading the values of masks, by making it believe that it is being traced.

    Flex attention is replaced by operations that can be recorded.
    """
    names = [name for name in sys.modules if name.startswith("transformers.")]
    patched = []
    for name in names:
        module = sys.modules[name]
        if "is_tracing" in getattr(module, "__dict__", {}):
            patched.append((module, module.is_tracing))
            module.is_tracing = lambda *_args, **_kwargs: True  # type: ignore[attr-defined]
    try:
        with dense_flex_attention():
            yield
    finally:
        for module, original in patched:
            module.is_tracing = original  # type: ignore[attr-defined]
