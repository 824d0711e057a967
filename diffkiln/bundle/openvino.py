"""Describes an engine of OpenVINO on disk, and imports OpenVINO. No torch: exporter and engine share it."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from diffkiln.guards import forks

#: What an engine's directory holds: the graph, the weights and constants in it, and what is true of both.
MODEL, WEIGHTS, FACTS = "engine.xml", "engine.bin", "engine.json"
#: The distribution, and the extra that installs it beside the compiler.
PACKAGE, INSTALL = "openvino", "pip install 'diffkiln[openvino]'"

_Text = Annotated[str, StringConstraints(max_length=256)]
_Count = Annotated[int, Field(ge=1, le=4096)]

Holder = Literal["input", "engine"]
Precision = Literal["f32", "bf16"]
Mode = Literal["latency", "throughput"]
#: Of weights in an engine: eight or four bits, with scales and zero points.
WeightFormat = Literal["int8", "int4"]


class Facts(BaseModel):
    """The facts of an engine, as they stand in its file.

    Attributes:
        version: of OpenVINO: the one that made the engine, and that alone runs it.
        digest: SHA-256 of the graph and the weights, in hexadecimal.
        sizes: of both files, in bytes.
        inputs: by position, the names that the graph has for the region's inputs; None for what the engine holds or
            does not read.
        weights: where the engine's weights are: in itself, or among its inputs.
        inference_precision: the type that the engine computes in.
        performance_mode, threads, streams: as the spec has them; None for OpenVINO's or torch's own choice.
        weight_format: of the weights that the engine holds; None for the bundle's own.
        group_size: weights of a row that share a scale, where they have four bits.
    """

    model_config: ClassVar[ConfigDict] = ConfigDict(strict=True, extra="ignore", frozen=True)

    version: _Text
    digest: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
    sizes: tuple[Annotated[int, Field(ge=0, lt=2**53)], Annotated[int, Field(ge=0, lt=2**53)]]
    inputs: tuple[_Text | None, ...]
    weights: Holder = "input"
    inference_precision: Precision = "f32"
    performance_mode: Mode = "latency"
    threads: _Count | None = None
    streams: _Count | None = None
    weight_format: WeightFormat | None = None
    group_size: _Count | None = None

    def settings(self, threads: int) -> dict[str, str | int]:
        """Returns OpenVINO's properties for this engine.

        Args:
            threads: of the process, where the engine states none.
        """
        stated: dict[str, str | int] = {
            "INFERENCE_PRECISION_HINT": self.inference_precision,
            "PERFORMANCE_HINT": self.performance_mode.upper(),
            "INFERENCE_NUM_THREADS": self.threads or threads,
            # torch's threads need the same cores, so OpenVINO's are bound to none.
            "ENABLE_CPU_PINNING": "NO",
            # By default OpenVINO rounds the activations before int8 weights to int8, too.
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
        }
        if self.streams is not None:
            stated["NUM_STREAMS"] = self.streams
        elif self.performance_mode == "latency":
            stated["NUM_STREAMS"] = 1
        return stated


#: Properties with which a model is compiled whose export does not repeat its weights.
COMPACT: Mapping[str, str] = MappingProxyType({"CACHE_MODE": "OPTIMIZE_SIZE"})


def kept_beside(directory: Path) -> dict[str, str | bool]:
    """Returns the properties with which such an export is imported; the weights are those in the engine's directory."""
    return {"WEIGHTS_PATH": str(directory / WEIGHTS), "ENABLE_WEIGHTLESS": True}


_IMPORTING = forks.Lock()
_TELEMETRY = "openvino_telemetry"


def import_openvino() -> Any:
    """Returns the module `openvino`, imported without its telemetry.

    Its converter, which is imported on the way and not used here, otherwise makes an identity for this user in ~/intel.
    Without the package of telemetry it takes a stand-in.

    Raises:
        ImportError: OpenVINO is not installed.
    """
    return import_without_telemetry(PACKAGE)


def import_without_telemetry(package: str) -> Any:
    """Returns OpenVINO or a package of its makers, which then reports no usage.

    Raises:
        ImportError: it is not installed.
    """
    with _IMPORTING:
        if package in sys.modules or _TELEMETRY in sys.modules:
            return import_module(package)
        sys.modules[_TELEMETRY] = None  # type: ignore[assignment]: what Python takes for "cannot be imported"
        try:
            return import_module(package)
        finally:
            del sys.modules[_TELEMETRY]
