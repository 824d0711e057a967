"""What an engine of TensorRT is on disk, and which of the two libraries runs it. No torch, and neither library.

Exporter and engine share it, and neither may import the other. There are two libraries of one interface. *TensorRT for
RTX* compiles kernels where the engine runs; *TensorRT*'s engines bring theirs. An engine runs with the very version
that built it.
"""

from __future__ import annotations

from dataclasses import dataclass

#: What an engine's directory holds: the engine, the model that it was built from, what it needs, and its layers.
ENGINE, MODEL, FACTS, LAYERS = "engine.trt", "engine.onnx", "engine.json", "layers.json"
#: What timing kernels gave, where the library keeps it; the kernels compiled for one GPU, where they travel.
TIMING, KERNELS = "timing.cache", "runtime.cache"

Capability = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Library:
    """A TensorRT library: its module, its distribution, its name in sentences, and its install command."""

    module: str
    package: str
    title: str
    install: str
    #: Those that it builds for without having the GPU; empty where it needs the GPU itself.
    portable: frozenset[Capability] = frozenset()


RTX = Library(
    "tensorrt_rtx",
    "tensorrt-rtx",
    "TensorRT for RTX",
    "pip install 'diffkiln[tensorrt]'",
    frozenset([(7, 5), (8, 6), (8, 9), (12, 0), (12, 1)]),
)
FULL = Library("tensorrt", "tensorrt", "TensorRT", "pip install tensorrt")
LIBRARIES = {library.module: library for library in (RTX, FULL)}
