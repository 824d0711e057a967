"""What TensorRT takes: which library builds for which GPU, and types that it computes in.

*TensorRT for RTX* builds without a GPU, for the compute capabilities of its support matrix. *TensorRT* builds for the
GPU that it finds, whose kernels it times.

Sources: https://docs.nvidia.com/deeplearning/tensorrt-rtx/latest/getting-started/support-matrix.html (its 8.0 is in the
library's own list and not in the matrix, so it is left to TensorRT), and what TensorRT for RTX 1.7 said when tried.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from diffkiln.bundle.tensorrt import FULL, RTX, Capability, Library
from diffkiln.errors import Problem
from diffkiln.exporters._onnx.needs import EXPORTING, missing_modules
from diffkiln.exporters._onnx.types import refused_of
from diffkiln.exporters.base import Exporter
from diffkiln.exporters.flags import Flags
from diffkiln.exporters.options import UNBROKEN, Lacks, Options
from diffkiln.program import Program
from diffkiln.spec import Conflict, Runtime, refuse
from diffkiln.spec.targets import Target

#: The oldest capability that either library builds for.
OLDEST: Capability = (7, 5)

#: Types that networks take and compute in. uint8 is only cast, float8 only dequantized, and float64 is taken for
#: float32 without a word.
TYPES = ("float32", "float16", "bfloat16", "int8", "int32", "int64", "bool")
_WITHOUT_BFLOAT16: Capability = (8, 0)


class TensorrtOptions(Options):
    """The place of an engine's weights."""

    lowers: ClassVar = ("weights", "weight_budget")

    fullgraph: Annotated[bool, UNBROKEN] = True
    flags: Annotated[Flags | None, Lacks("they are Inductor's, and TensorRT has none of them", "Remove them")] = None
    weights: Literal["input", "engine"] | None = Field(
        None,
        description="For tensorrt. input: the bundle passes the weights to the engine. engine: the engine holds them, "
        "and TensorRT streams those that the GPU has no room for. Absent: input.",
    )
    weight_budget_gb: float | None = Field(
        None,
        ge=0,
        description='For "weights": "engine": GB of weights that stay on the GPU. Absent: as much as the target\'s '
        "memory allows.",
    )

    @classmethod
    def conflicts(cls, given: Mapping[str, Any]) -> Iterator[Conflict]:
        """Yields options of weights that would have no effect, or that contradict an engine for several blocks."""
        yield from super().conflicts(given)
        holds = given.get("weights") == "engine"
        if holds and given.get("scope") == "blocks":
            yield ("weights",), refuse("one engine serves every block of a class, and each has its own", "Remove it")
        if given.get("weight_budget_gb") is not None and not holds:
            hint = 'Set "weights" to "engine", or remove it: runtime.offload plans the weights of the store'
            yield ("weight_budget_gb",), refuse("the engine does not hold weights", hint)

    def lowered(self) -> dict[str, Any]:
        """Returns `weights` where the engine holds them, and `weight_budget`: bytes of them that stay on the GPU."""
        budget = self.weight_budget_gb
        held = {"weights": self.weights} if self.weights == "engine" else {}
        return held if budget is None else held | {"weight_budget": int(budget * 1e9)}


class Tensorrt(Exporter):
    """The backend `tensorrt`."""

    name: ClassVar[str] = "tensorrt"
    version: ClassVar[int] = 2
    builder = "diffkiln.exporters.tensorrt.build"
    summary = "has TensorRT build ONNX into an engine for a GPU."
    options = TensorrtOptions
    whole = True
    computes = "float16"
    examples: ClassVar = ({"name": "compile", "component": "transformer", "backend": name},)

    def holds_weights(self, options: Mapping[str, Any]) -> bool:
        return options.get("weights") == "engine"

    def target_problems(self, target: Target) -> Iterator[Problem]:
        if target.device != "cuda":
            reason = f"TensorRT builds for NVIDIA's GPUs, the target is {target.name}"
            yield Problem("", reason, "Choose a GPU as the target, or another backend.")
        elif target.capability < OLDEST:
            least = ".".join(map(str, OLDEST))
            reason = f"found compute capability {target.compute_capability} ({target.name}), required {least} or later"
            yield Problem("", f"TensorRT: {reason}", "Choose another backend.")

    def refused_facts(self, options: Options) -> Mapping[str, Problem]:
        reason = "TensorRT computes attention in its own way, and ignores attention_backend"
        return {"attention_chosen": Problem("", reason, "Remove one of the two, or choose aot_inductor.")}

    def machine_problems(self, target: Target) -> Iterator[Problem]:
        yield from missing_modules(*EXPORTING)
        library = library_for(target.capability)
        if find_spec(library.module) is None:
            yield _library_missing(library, target)

    def refused_type(self, dtype: str, target: Target) -> str | None:
        return type_problem(dtype, target.capability)

    def runtime_problems(self, options: Options, runtime: Runtime, where: str) -> Iterator[Problem]:
        if not self.holds_weights(options.lowered()):
            return
        if runtime.cuda_graphs is not None:
            reason = "TensorRT brings its engine's weights in from the host, and a CUDA graph holds addresses"
            yield Problem(f"{where}.weights", reason, 'Set it to "input", or remove "cuda_graphs".')
        if runtime.on_incompatible == "eager":
            reason = "the weights are in the engines, and without them the bundle cannot be replayed"
            hint = 'Remove it, or remove "on_incompatible": "eager" from "runtime".'
            yield Problem(f"{where}.weights", reason, hint)

    def refused_types(self, program: Program, target: Target) -> Iterator[str]:
        if target.device == "cuda":
            yield from type_problems(program, target.capability)


def _library_missing(library: Library, target: Target) -> Problem:
    """Returns the problem, with its hint, of a missing library that builds for a target."""
    reason = f"{target.name} ({target.sm}): found no package {library.package}, required to build for it"
    if library is RTX:
        return Problem("", reason, library.install)
    able = ", ".join(f"{major}.{minor}" for major, minor in sorted(RTX.portable))
    hint = (
        f"{library.install}, on a machine with that GPU, which {library.title} times its kernels on; or choose another "
        "target or backend."
    )
    return Problem("", f"{reason}, since {RTX.package} builds for {able} alone", hint)


def library_for(capability: Capability) -> Library:
    """Returns the library that builds for a compute capability: TensorRT for RTX wherever it can."""
    return RTX if capability in RTX.portable else FULL


def type_problem(dtype: str, capability: Capability) -> str | None:
    """Returns why a type is refused, found against required; None if it is accepted."""
    if dtype not in TYPES:
        return f"found {dtype}, required one of {', '.join(TYPES)}"
    if dtype == "bfloat16" and capability < _WITHOUT_BFLOAT16:
        major, minor = capability
        return f"found bfloat16 for compute capability {major}.{minor}, required float32 or float16"
    return None


def type_problems(program: Program, capability: Capability) -> Iterator[str]:
    """Returns the types of a program that TensorRT cannot take, each once, with their user."""
    return refused_of(program, lambda dtype: type_problem(dtype, capability))
