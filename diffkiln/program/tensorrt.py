"""TensorRT: which library builds for which GPU, and what of a program it takes. No torch, and neither library.

There are two libraries of one interface. *TensorRT for RTX* builds without a GPU, for the compute capabilities of its
support matrix, and compiles kernels where the engine runs. *TensorRT* builds for the GPU that it finds, whose kernels
it times. An engine runs with the very version that built it.

Sources: https://docs.nvidia.com/deeplearning/tensorrt-rtx/latest/getting-started/support-matrix.html (its 8.0 is in the
library's own list and not in the matrix, so it is left to TensorRT), and what TensorRT for RTX 1.7 said when tried.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from diffkiln.program.ir import Program
from diffkiln.program.pairs import PARTS, pair_problems

#: What an engine's directory holds: the engine, the model that it was built from, what it needs, and its layers.
ENGINE, MODEL, FACTS, LAYERS = "engine.trt", "engine.onnx", "engine.json", "layers.json"
#: What timing kernels gave, where the library keeps it; the kernels compiled for one GPU, where they travel.
TIMING, KERNELS = "timing.cache", "runtime.cache"

Capability = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Library:
    """One of the two: its module, its distribution, its name in sentences, and what installs it."""

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

#: The oldest capability that either library builds for.
OLDEST: Capability = (7, 5)

#: Types that networks take and compute in. uint8 is only cast, float8 only dequantized, and float64 is taken for
#: float32 without a word.
TYPES = ("float32", "float16", "bfloat16", "int8", "int32", "int64", "bool")
_WITHOUT_BFLOAT16: Capability = (8, 0)


def library_for(capability: Capability) -> Library:
    """The library that builds for a compute capability: TensorRT for RTX wherever it can."""
    return RTX if capability in RTX.portable else FULL


def type_problem(dtype: str, capability: Capability) -> str | None:
    """Why a type cannot be taken, found against required; None where it can."""
    if dtype not in TYPES:
        return f"found {dtype}, required one of {', '.join(TYPES)}"
    if dtype == "bfloat16" and capability < _WITHOUT_BFLOAT16:
        major, minor = capability
        return f"found bfloat16 for compute capability {major}.{minor}, required float32 or float16"
    return None


def type_problems(program: Program, capability: Capability) -> Iterator[str]:
    """The types of a program that TensorRT cannot take, each once, with who uses it."""
    told: set[str] = set()
    for name, kind in program.types.items():
        dtype = PARTS.get(kind.dtype, kind.dtype)
        reason = None if dtype in told else type_problem(dtype, capability)
        if reason:
            told.add(dtype)
            yield f"{reason} ({name.lstrip('%@#')} of {program.name})"
    yield from pair_problems(program)


def planned_budget(memory: int | None, weights: int) -> int | None:
    """Bytes of an engine's own weights that stay on the GPU; None where all do.

    A quarter of the memory is left to activations, to the two buffers that weights are streamed through, and to the
    other components.

    Args:
        memory: of the target's GPU, in bytes; None is not known.
        weights: of the engine, in bytes.
    """
    kept = None if memory is None else memory * 3 // 4
    return kept if kept is not None and weights > kept else None
