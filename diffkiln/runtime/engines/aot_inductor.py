"""Run what AOTInductor built, with torch's own loader: no compiler, no process, nothing of `torch._inductor`.

The loader checks nothing. The directory must hold files that were verified, and the machine must be one that the
manifest allows: the compatibility and trust gates come before this module.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from diffkiln.errors import Incompatible, Incomplete
from diffkiln.runtime.engines.base import Layout, check_inputs

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
        if not (directory / _LIBRARY).is_file():
            raise Incomplete(f"{directory}: the file {_LIBRARY} is missing")
        self._loader, self._run = _load(directory, self.device)

    def __call__(self, flat: list[torch.Tensor]) -> list[torch.Tensor]:
        return self._run([tensor if tensor.is_contiguous() else tensor.contiguous() for tensor in flat])

    def check(self, flat: Sequence[torch.Tensor]) -> None:
        check_inputs(flat, self.inputs, self.device, self._name)


def _load(directory: Path, device: torch.device) -> tuple[object, _Run]:
    """torch's loader, which must live as long as the engine, and its entry point."""
    aoti = torch._C._aoti  # type: ignore[attr-defined]
    index = -1 if device.index is None else device.index
    try:
        loader = aoti.AOTIModelPackageLoader(str(directory), "model", False, 1, index)
        return loader, loader.boxed_run
    except (RuntimeError, TypeError, AttributeError) as error:
        if device.type != "cpu" or "zip" not in str(error):
            raise Incompatible(
                f"{directory}: torch {torch.__version__} cannot load the engine: {str(error).partition(chr(10))[0]}"
            ) from error
    # A torch whose loader takes archives only; below it lies a runner that takes the library.
    runner = aoti.AOTIModelContainerRunnerCpu(str(directory / _LIBRARY), 1)
    return runner, runner.run
