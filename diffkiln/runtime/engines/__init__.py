"""What an engine is to the executor: tensors in, tensors out, weights among the inputs.

A plug-in of the kind `engines` is the class that runs what a backend built, in a module or a package of this folder
that is imported when a bundle names it and no sooner.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Protocol

import torch

from diffkiln import plugins
from diffkiln.errors import Incompatible, MissingDependency, VerifyError


class Layout(Protocol):
    """A tensor's dtype (by name), shape and stride (in elements), as the manifest's rows have them."""

    @property
    def dtype(self) -> str: ...

    @property
    def shape(self) -> Sequence[int]: ...

    @property
    def stride(self) -> Sequence[int]: ...


class Engine(Protocol):
    """A loaded engine. Its inputs are the region's, then its weights, then its constants."""

    def __call__(self, flat: list[torch.Tensor]) -> list[torch.Tensor]:
        """Runs the engine. `flat` stays the caller's; tensors that are not contiguous are copied first."""
        ...

    def check(self, flat: Sequence[torch.Tensor]) -> None:
        """Compares inputs with those that the engine was built for. The self-test uses it; a call compares nothing.

        Raises:
            VerifyError: says which input differs and how.
        """
        ...


def holds_weights(engine: Engine) -> bool:
    """Returns True if an engine has its own weights and ignores those among its inputs."""
    return getattr(engine, "holds_weights", False)


def comparing(engine: Engine) -> AbstractContextManager[None]:
    """Has an engine compare more of what it does, inside the `with` block, where it can. The self-test uses it."""
    compare = getattr(engine, "comparing", None)
    return compare() if compare is not None else nullcontext()


def learned(engine: Engine) -> Mapping[str, bytes]:
    """Returns files that running an engine made; stored beside it, they spare the next process that work."""
    files = getattr(engine, "learned", None)
    return files() if files is not None else {}


class EngineClass(Protocol):
    """A plug-in. Its `stand_ins`, where it has some, are distributions that bring a package that it needs, by the
    package that bundles name."""

    def __call__(self, directory: Path, inputs: Sequence[Layout], device: torch.device | str = "cpu") -> Engine: ...


def engine(name: str) -> EngineClass:
    """Returns the class that runs this backend's engines.

    Raises:
        Incompatible: no package that is installed brings it.
        MissingDependency: it needs a package that is not installed.
    """
    known = plugins.plugins("engines")
    if name not in known:
        raise Incompatible(
            f"engine backend: found {name!r}, this diffkiln runs {', '.join(known)}. Install a later diffkiln, or the "
            "package that brings it"
        )
    return plugins.load("engines", name)


def stand_ins(package: str) -> Iterator[str]:
    """Yields the distributions that an engine takes in the place of a package."""
    for plugin in plugins.plugins("engines").values():
        try:
            yield from getattr(plugin.load(), "stand_ins", {}).get(package, ())
        except MissingDependency:
            continue


def check_inputs(flat: Sequence[torch.Tensor], expected: Sequence[Layout], device: torch.device, what: str) -> None:
    """Compares inputs with layouts, as `Engine.check` does. Strides of dimensions of one element do not count."""
    if len(flat) != len(expected):
        raise VerifyError(f"{what}: {len(flat)} inputs found, {len(expected)} required")
    for position, (tensor, layout) in enumerate(zip(flat, expected, strict=True)):
        found = str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), _steps(tensor.shape, tensor.stride())
        required = layout.dtype, tuple(layout.shape), _steps(layout.shape, layout.stride)
        for name, have, need in zip(("dtype", "shape", "stride"), found, required, strict=True):
            if have != need:
                raise VerifyError(f"{what}, input {position}: {name} {have} found, {need} required")
        if tensor.device.type != device.type or device.index not in (None, tensor.device.index):
            raise VerifyError(f"{what}, input {position}: it is on {tensor.device}, the engine on {device}")


def _steps(shape: Sequence[int], stride: Sequence[int]) -> tuple[int, ...]:
    """Returns the strides that matter; none for a tensor without elements."""
    if 0 in shape:
        return ()
    return tuple(step for size, step in zip(shape, stride, strict=True) if size != 1)
