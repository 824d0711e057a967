"""Run a region that was stored as it is."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from diffkiln.interpreter.aten import Interpreter
from diffkiln.program import program_from_json
from diffkiln.runtime.engines import Layout, check_inputs


class ReplayEngine:
    """One region."""

    def __init__(self, directory: Path, inputs: Sequence[Layout], device: torch.device | str = "cpu") -> None:
        self.inputs, self.device = tuple(inputs), torch.device(device)
        self._region = program_from_json(json.loads((directory / "region.json").read_bytes()))
        options = json.loads((directory / "options.json").read_bytes())
        self._run = Interpreter(self._region, self.device, paranoid=options.get("paranoid", False))

    def __call__(self, flat: list[torch.Tensor]) -> list[torch.Tensor]:
        values = iter(flat)
        inputs = [next(values) for _ in self._region.inputs]
        weights = {name: next(values) for name in self._region.weights}
        constants = {key: next(values) for key in self._region.constants}
        with torch.inference_mode():
            return [output.contiguous() for output in self._run(inputs, weights, constants)]

    def check(self, flat: Sequence[torch.Tensor]) -> None:
        check_inputs(flat, self.inputs, self.device, "the engine")
