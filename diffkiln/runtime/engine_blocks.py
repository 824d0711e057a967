"""Engines in the place of a diffusers module's repeated blocks: same arguments in, same results out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from diffkiln.errors import CallError, IntegrityError
from diffkiln.guards.printable import get_logger
from diffkiln.interpreter.aten import dtype_of, type_of
from diffkiln.program import REGION, Module, Program, Ref
from diffkiln.program.narrowed import full
from diffkiln.runtime.changes import Watch
from diffkiln.runtime.engines import Engine, holds_weights

log = get_logger(__name__)


class Mismatch(Exception):
    """Arguments that a region was not compiled for; says what differs."""


class _Weight:
    """One weight of a block, looked up at each call and compared with what was compiled: an engine compares nothing."""

    def __init__(self, block: torch.nn.Module, name: str, region: Program) -> None:
        type_ = region.types[f"@{name}"]
        self._get, self._name, self._type = weight_getter(block, name), name, type_
        self._dtype, self._shape = dtype_of(type_.dtype), torch.Size(type_.shape)

    def __call__(self, device: torch.device | None) -> torch.Tensor:
        tensor = self._get()
        if tensor.dtype is not self._dtype or tensor.shape != self._shape:
            raise Mismatch(f"the weight {self._name} is {type_of(tensor)} by now, compiled for {self._type}")
        if device is not None and tensor.device != device:
            raise Mismatch(f"the weight {self._name} is on {tensor.device}, the arguments on {device}")
        return tensor


class EngineBlock:
    """The `forward` of one block: picks the engine that was compiled for the arguments and runs it.

    Args:
        block: the module whose place it takes; its weights are looked up at each call, so they may be offloaded.
        name: of the block, for messages.
        engines: the regions of this block, each with its engine.
        constants: folded tensors by key.
        eager: run the block's own code where no region fits, or where the block was changed, instead of raising
            CallError.
    """

    def __init__(
        self,
        block: torch.nn.Module,
        name: str,
        engines: Sequence[tuple[Program, Engine]],
        constants: Mapping[str, torch.Tensor],
        eager: bool,
    ) -> None:
        self._original, self._name, self._eager = block.forward, name, eager
        self._ways = [
            (region, engine, [_Weight(block, name, region) for name in region.weights],
             [constants[key] for key in region.constants])
            for region, engine in engines
        ]  # fmt: skip
        self._block, self._held = block, any(holds_weights(engine) for _, engine in engines)
        self._watch: Watch | None = None
        self._warned = False

    def watch(self, filed: bool = False) -> None:
        """Notices from now on what is changed inside of the block.

        Args:
            filed: the weights lie in files between their uses, so that what is written to them in place is lost.
        """
        self._watch = Watch(self._block, self._held, filed)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise CallError(f"{self._name}: a block with an engine cannot be copied or saved. Load the bundle once more")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._watch is not None and (change := self._watch.change()):
            return self._changed(change)(*args, **kwargs)
        reasons = []
        for region, engine, weights, constants in self._ways:
            try:
                values = arguments(region, args, kwargs)
                inputs = [values[item.name] for item in region.inputs]
                device = inputs[0].device if inputs else None
                held = [weight(device) for weight in weights]
            except Mismatch as error:
                reasons.append(str(error))
                continue
            outputs = engine([*inputs, *held, *constants])
            named = values | {ref.name: tensor for ref, tensor in zip(region.outputs, outputs, strict=True)}
            return _built(region.signature["result"], named)
        if self._eager:
            return self._original(*args, **kwargs)
        raise CallError(
            f"{self._name}: {'; '.join(reasons)}. Call the pipeline with the sizes of a variant, or compile one with "
            "these"
        )

    def _changed(self, change: str) -> Callable[..., Any]:
        """Runs the block's own code, where it may run in the engine's place."""
        if not self._eager:
            raise CallError(
                f"{self._name}: {change}, which the compiled block would ignore. Undo it, or put it into the spec (an "
                "adapter by the pass fuse_lora, or by load_lora where the bundle is loaded without as_diffusers), or "
                'compile with "on_incompatible": "eager" in "runtime" to run such a block without its engine'
            )
        if not self._warned:
            log.warning("%s runs without its engine: %s", self._name, change)
            self._warned = True
        return self._original


def plug_in(
    component: torch.nn.Module,
    recorded: Module,
    engines: Mapping[str, Engine],
    constants: Mapping[str, torch.Tensor],
    eager: bool,
) -> list[EngineBlock]:
    """Gives every block that has an engine an `EngineBlock`. What is no block runs as diffusers has it.

    Args:
        component: the diffusers module.
        recorded: its programs.
        engines: by region.
        constants: folded tensors by key.
        eager: see `EngineBlock`.

    Returns:
        Those that were given; `watch` them when nothing more is done to the blocks.
    """
    regions: dict[str, dict[str, None]] = {}
    for program in full(recorded.programs).values():
        for op in program.ops:
            # A region without a signature takes more than the block is given.
            known = (
                op.name == REGION and op.attrs["region"] in engines and recorded.regions[op.attrs["region"]].signature
            )
            if known and op.attrs["instance"]:
                regions.setdefault(op.attrs["instance"], {})[op.attrs["region"]] = None
    made: list[EngineBlock] = []
    for instance, names in regions.items():
        block = component.get_submodule(instance)
        pairs = [(recorded.regions[name], engines[name]) for name in names]
        made.append(EngineBlock(block, instance, pairs, constants, eager))
        block.forward = made[-1]
    return made


def arguments(region: Program, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Returns the tensors of a call by the names of the region's inputs.

    Raises:
        Mismatch: the call has other arguments, or tensors of other types, than were recorded.
    """
    found: dict[str, torch.Tensor] = {}
    _match(region.signature["args"], tuple(args), "positional arguments", found)
    given = {key: value for key, value in kwargs.items() if key in region.signature["kwargs"] or value is not None}
    _match(region.signature["kwargs"], given, "arguments", found)
    for item in region.inputs:
        if type_of(found[item.name]) != item.type:
            raise Mismatch(f"{item.argument} is {type_of(found[item.name])}, compiled for {item.type}")
    return found


def _match(template: Any, value: Any, where: str, found: dict[str, torch.Tensor]) -> None:
    if isinstance(template, Ref):
        if not isinstance(value, torch.Tensor):
            raise Mismatch(f"{where} is not a tensor, compiled for one")
        found[template.name] = value
    elif isinstance(template, (tuple, list)):
        if not isinstance(value, (tuple, list)) or len(value) != len(template):
            raise Mismatch(f"{where}: compiled for {len(template)} values")
        for index, (part, item) in enumerate(zip(template, value, strict=True)):
            _match(part, item, f"{where}[{index}]", found)
    elif isinstance(template, Mapping):
        if not isinstance(value, Mapping) or value.keys() != template.keys():
            raise Mismatch(f"{where}: compiled for {', '.join(template)}")
        for key, part in template.items():
            _match(part, value[key], key, found)
    elif isinstance(value, torch.Tensor) or (value != template and str(value) != str(template)):
        raise Mismatch(f"{where} is {type(value).__name__} {_short(value)}, compiled for {template!r}")


def _built(template: Any, values: Mapping[str, torch.Tensor]) -> Any:
    """Returns a result in the form that the block gives."""
    if isinstance(template, Ref):
        return values[template.name]
    if isinstance(template, (tuple, list)):
        return tuple(_built(part, values) for part in template)
    if isinstance(template, Mapping):
        return {key: _built(part, values) for key, part in template.items()}
    return template


def weight_getter(module: torch.nn.Module, name: str) -> Callable[[], torch.Tensor]:
    """Returns a function that gives a weight's present value: a parameter, a buffer, or a tensor of a quantized one.

    Raises:
        IntegrityError: the module has no such weight.
    """
    path = name.split(".")
    owner = module
    while path and (child := owner._modules.get(path[0])) is not None:
        owner = child
        del path[0]
    table = owner._parameters if path and path[0] in owner._parameters else owner._buffers
    if not path or path[0] not in table:
        raise IntegrityError(f"a region reads the weight {name!r}, which the module does not have")
    leaf, inner = path[0], path[1:]

    def get() -> torch.Tensor:
        tensor: Any = table[leaf]
        for attribute in inner:
            tensor = getattr(tensor, attribute)
        return tensor

    return get


def _short(value: Any) -> str:
    return str(tuple(value.shape)) if isinstance(value, torch.Tensor) else repr(value)[:40]
