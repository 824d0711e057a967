"""Lower a region to a model of ONNX, whose weights and constants are inputs."""

from __future__ import annotations

from pathlib import Path

from diffkiln.exporters._onnx.needs import exporting_tools
from diffkiln.exporters._onnx.writing import write_model
from diffkiln.exporters.artefact import Artefact, Lowering
from diffkiln.exporters.base import input_specs
from diffkiln.exporters.cache import EngineCache
from diffkiln.exporters.onnx.check import Onnx


def tools(lowering: Lowering) -> dict[str, str]:
    return exporting_tools()


def build(lowering: Lowering, folder: Path, cache: EngineCache) -> Artefact:
    outputs = write_model(lowering, folder).outputs
    return Artefact(Onnx.name, folder, input_specs(lowering.region), outputs, dict(lowering.options))
