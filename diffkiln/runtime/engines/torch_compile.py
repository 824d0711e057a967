"""Run what the backend `torch_compile` prepared: compile the region here, out of the caches that came with it.

Inductor reads and writes a private copy of the caches, which is gone when the engine is there. What it finds in them
can do whatever code can, so they must be files that were verified and are trusted: those gates come before this module.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from diffkiln.bundle.scratch import scratch
from diffkiln.errors import Incompatible, Incomplete
from diffkiln.guards.printable import get_logger
from diffkiln.interpreter.fx import CACHES, OPTIONS, REGION, compiled
from diffkiln.program import ATTENTION, program_from_json
from diffkiln.runtime.attention import packaged
from diffkiln.runtime.engines import Layout, check_inputs

_LOG = get_logger("diffkiln")


class TorchCompileEngine:
    """One region, compiled.

    Args:
        directory: as `diffkiln.exporters.torch_compile` lays it out.
        inputs: the layouts of the engine's inputs in order.
        device: the one that it was built for.

    Raises:
        Incomplete: a file is not there.
        Incompatible: it is for another kind of device.
        MissingDependency: a compiler that torch needs is not there.
        ExportError: torch cannot compile it here.
    """

    def __init__(self, directory: Path, inputs: Sequence[Layout], device: torch.device | str = "cpu") -> None:
        self.inputs = tuple(inputs)
        self.device = torch.device(device)
        self._name = f"the engine {directory.name}"
        recorded = json.loads(_read(directory / OPTIONS))
        if recorded["device"] != self.device.type:
            raise Incompatible(f"{directory}: found {self.device.type}, required {recorded['device']}")
        region = program_from_json(json.loads(_read(directory / REGION)))
        with scratch("jit") as folder:
            caches = folder / CACHES
            if (directory / CACHES).is_dir():
                shutil.copytree(directory / CACHES, caches, copy_function=shutil.copyfile)
            self._run, found = compiled(
                region,
                caches,
                device=self.device,
                isa=recorded["isa"],
                flags=recorded["flags"],
                fullgraph=recorded["fullgraph"],
                special={ATTENTION: packaged},
            )
        if not found:
            _LOG.warning("%s: its caches do not fit this torch or its settings, and it was compiled again", self._name)

    def __call__(self, flat: list[torch.Tensor]) -> list[torch.Tensor]:
        with torch.inference_mode():
            return list(self._run([tensor if tensor.is_contiguous() else tensor.contiguous() for tensor in flat]))

    def check(self, flat: Sequence[torch.Tensor]) -> None:
        check_inputs(flat, self.inputs, self.device, self._name)


def _read(file: Path) -> Any:
    try:
        return file.read_bytes()
    except FileNotFoundError:
        raise Incomplete(f"{file.parent}: the file {file.name} is missing") from None


PLUGIN = TorchCompileEngine
