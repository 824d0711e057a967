"""Run what AOTInductor built, with torch's own loader: no compiler, no process, nothing of `torch._inductor`.

The loader checks nothing. The directory must hold files that were verified, and the machine must be one that the
manifest allows: the compatibility and trust gates come before this module.
"""

from __future__ import annotations

import ctypes
import os
import threading
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from diffkiln.bundle.native import COMPARE
from diffkiln.bundle.scratch import scratch
from diffkiln.errors import Incompatible, Incomplete
from diffkiln.runtime.engines import Layout, check_inputs

_LIBRARY = Path("data", "aotinductor", "model", "engine.so")

#: Takes the tensors out of the list that it is given.
_Run = Callable[[list[torch.Tensor]], list[torch.Tensor]]


class AotInductorEngine:
    """One shared object.

    Args:
        directory: an unpacked package, as `diffkiln.exporters.aot_inductor` lays it out.
        inputs: the layouts of the engine's inputs in order.
        device: the one that it was built for.

    Raises:
        Incomplete: the library is not there.
        Incompatible: it cannot be loaded here, say for an older C library.
    """

    def __init__(self, directory: Path, inputs: Sequence[Layout], device: torch.device | str = "cpu") -> None:
        self.inputs = tuple(inputs)
        self.device = torch.device(device)
        self._name = f"the engine {directory.name}"
        self._library = directory / _LIBRARY
        if not self._library.is_file():
            raise Incomplete(f"{directory}: the file {_LIBRARY} is missing")
        # Unless it is alone, torch's loader records an event after each call on a GPU, and the host waits for it before
        # the next call. A CUDA graph cannot hold the event either. The lock makes calls take turns instead.
        alone = self.device.type != "cpu"
        self._turn: AbstractContextManager[object] = threading.Lock() if alone else nullcontext()
        self._loader, self._run = _load(directory, self.device, alone)

    def __call__(self, flat: list[torch.Tensor]) -> list[torch.Tensor]:
        held = [tensor if tensor.is_contiguous() else tensor.contiguous() for tensor in flat]
        with self._turn:
            return self._run(held)

    @contextmanager
    def comparing(self) -> Iterator[None]:
        """Has an engine for a GPU compare the layouts of tensors, inside the `with` block."""
        compare = _switch(self._library) if self.device.type != "cpu" else None
        if compare is None:
            yield
            return
        compare(True)
        try:
            yield
        finally:
            compare(False)

    def check(self, flat: Sequence[torch.Tensor]) -> None:
        check_inputs(flat, self.inputs, self.device, self._name)


def _switch(library: Path) -> Callable[[bool], None] | None:
    """Returns the function of a library that is loaded already; None where it has none, as those of earlier builds."""
    loaded = ctypes.CDLL(str(library), mode=os.RTLD_NOLOAD | os.RTLD_NOW)  # fails if torch did not load it
    function = getattr(loaded, COMPARE, None)
    if function is not None:
        function.argtypes, function.restype = (ctypes.c_bool,), None
    return function


def _load(directory: Path, device: torch.device, alone: bool) -> tuple[object, _Run]:
    """Returns torch's loader, which must live as long as the engine, and its entry point.

    `alone` says that no two threads call the entry point at the same time.
    """
    try:
        try:
            loader = _loader(directory, device, alone)
        except RuntimeError as error:
            if "zip archive" not in str(error):
                raise
            loader = _from_archive(directory, device, alone)
        return loader, loader.boxed_run
    except (RuntimeError, TypeError, AttributeError) as error:
        raise Incompatible(
            f"{directory}: torch {torch.__version__} cannot load the engine: {str(error).partition(chr(10))[0]}"
        ) from error


def _loader(package: Path, device: torch.device, alone: bool) -> Any:
    index = -1 if device.index is None else device.index
    return torch._C._aoti.AOTIModelPackageLoader(str(package), "model", alone, 1, index)  # type: ignore[attr-defined]


def _from_archive(directory: Path, device: torch.device, alone: bool) -> Any:
    """Loads an engine by a torch that takes only archives, which it unpacks into a private directory.

    torch 2.11 is one. It finds the metadata by the name of a C++ source, which nobody compiles if there is a library,
    and the archive's root by the first two names.
    """
    with scratch("engine") as folder:
        package = folder / "engine.pt2"
        with zipfile.ZipFile(package, "w") as archive:
            for file in sorted(path for path in directory.rglob("*") if path.is_file()):
                archive.write(file, Path("engine", file.relative_to(directory)))
            archive.writestr(str(Path("engine", _LIBRARY.with_suffix(".cpp"))), "")
        return _loader(package, device, alone)


PLUGIN = AotInductorEngine
