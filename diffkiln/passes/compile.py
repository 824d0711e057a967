"""Have the regions of a component lowered by a backend."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from diffkiln.errors import Problem
from diffkiln.layers import repeated_blocks
from diffkiln.passes.base import CompileRequest, Fact, Outcome, Pass, Plan
from diffkiln.passes.outlining import SCHEDULER, between_blocks, between_calls, whole
from diffkiln.passes.quantizers.bitsandbytes import BitsAndBytes
from diffkiln.program import onnx, tensorrt
from diffkiln.record.pipeline import Recording
from diffkiln.spec import Conflict, Strict, Target, refuse


class Flags(Strict):
    """Flags of torch's Inductor, by its own names, that diffusers' guides recommend. Absent: as this torch has them.

    Source: https://huggingface.co/docs/diffusers/optimization/fp16 and .../tutorials/fast_diffusion.
    """

    conv_1x1_as_mm: bool | None = Field(None, description="Compute convolutions of one pixel as matrix products.")
    epilogue_fusion: bool | None = Field(None, description="Fuse what follows a matrix product into its kernel.")
    max_autotune: bool | None = Field(None, description="Time several kernels for each product, and take the fastest.")
    coordinate_descent_tuning: bool | None = Field(None, description="Tune each kernel's block sizes one by one.")
    coordinate_descent_check_all_directions: bool | None = Field(
        None, description="Tune neighbouring block sizes together, too."
    )
    force_fuse_int_mm_with_mul: bool | None = Field(
        None, description="Multiply an int8 product by its scale in the product's own kernel."
    )

    #: What decides nothing where no kernel is written by Triton.
    gpu_only: ClassVar = (
        "epilogue_fusion",
        "max_autotune",
        "coordinate_descent_tuning",
        "coordinate_descent_check_all_directions",
        "force_fuse_int_mm_with_mul",
    )


class Compile(Pass):
    """Have the regions of a component lowered by a backend; what is not lowered is replayed operation by operation.

    With `scope` "blocks" a region is a repeated block: each class that diffusers declares in `_repeated_blocks`; with
    `between` also what lies between the blocks. With `scope` "whole" it is the whole component, whose weights are then
    all needed at once. The component `scheduler` is the arithmetic between the denoiser's calls.

    `aot_inductor` writes native code for a CPU. `onnx` writes ONNX, which ONNX Runtime runs with the bundle's weights.
    `tensorrt` has TensorRT build that ONNX into an engine for a GPU.
    """

    name: ClassVar[str] = "compile"
    summary: ClassVar[str] = "lower a component ahead of time: its repeated blocks, or the whole of it"
    requires_not: ClassVar = {
        "quantized_by_bitsandbytes": BitsAndBytes.compiles,
        "hooked_inside": "its hooks are inside the blocks, which engines replace. Choose a schedule that reuses whole "
        "blocks, or do not compile the component",
        "attention_by_package": "an engine holds torch's operators alone, and a package computes the attention. Choose "
        "a native kernel, or do not compile the component",
        "gguf": "GGUF's layers are unpacked by operations that an engine would repeat at every call. Quantize the "
        "original weights with torchao, or do not compile the component",
    }
    examples: ClassVar = (
        {"name": "compile", "component": "transformer", "backend": "aot_inductor", "scope": "blocks"},
        {"name": "compile", "component": "vae", "scope": "whole", "flags": {"conv_1x1_as_mm": True}},
        {"name": "compile", "component": "scheduler"},
        {"name": "compile", "component": "text_encoder", "backend": "onnx"},
        {"name": "compile", "component": "transformer", "backend": "tensorrt"},
    )

    backend: Literal["aot_inductor", "onnx", "tensorrt"] = Field(
        "aot_inductor", description="The backend that lowers the regions."
    )
    scope: Literal["blocks", "whole"] | None = Field(
        None,
        description="What a region is: a repeated block, or the whole component. Absent: blocks for aot_inductor, "
        "the whole for onnx and tensorrt.",
    )
    between: bool = Field(False, description="Lower what lies between the blocks, too.")
    dynamic: bool | None = Field(
        None,
        description="Build one engine for all the sizes that a region is called with, where it can be, instead of one "
        "for each. Absent: where the inputs give a range of sizes.",
    )
    fullgraph: bool = Field(True, description="Demand that a region is one graph, without breaks.")
    flags: Flags | None = Field(None, description="Flags of torch's Inductor.")
    weights: Literal["input", "engine"] | None = Field(
        None,
        description="tensorrt only: whether weights are the engine's inputs, which the bundle's store brings in, or "
        "the engine's own, which TensorRT streams where the GPU cannot hold them. Absent: input.",
    )
    weight_budget_gb: float | None = Field(
        None,
        ge=0,
        description="With weights of the engine's own: how much of them stays on the GPU, in GB. Absent: what the "
        "target's memory allows.",
    )

    @classmethod
    def conflicts(cls, given: Mapping[str, Any]) -> Iterator[Conflict]:
        if given.get("fullgraph") is False:
            yield ("fullgraph",), refuse("an engine that is built ahead of time has no graph breaks", "Remove it")
        runner = _WHOLE.get(str(given.get("backend")))
        if given.get("between") and (given.get("scope") == "whole" or (runner and given.get("scope") != "blocks")):
            yield ("between",), refuse("the whole component is one region already", "Remove it")
        if runner and given.get("flags"):
            yield ("flags",), refuse(f"they are Inductor's, and {runner} has none of them", "Remove them")
        yield from _weight_conflicts(given)
        if given.get("component") == SCHEDULER:
            for name in ("scope", "between"):
                if given.get(name):
                    yield (name,), refuse("a scheduler has no blocks", "Remove it")

    @property
    def whole(self) -> bool:
        """Whether the component is one region."""
        return self.scope == "whole" or (self.scope is None and self.backend in _WHOLE)

    def packages(self) -> dict[str, str]:
        return {onnx.PACKAGE: onnx.VERSIONS} if self.backend == "onnx" else {}

    def provides(self) -> Iterable[Fact]:
        return [Fact("compiled", self.component, self.name)]

    def check(self, plan: Plan, target: Target, where: str) -> Sequence[Problem]:
        if self.component != SCHEDULER or SCHEDULER in plan.modules or plan.scheduler is None:
            return super().check(plan, target, where)
        return list(self._problems(None, plan, target, where))

    def check_module(self, module: torch.nn.Module, plan: Plan, target: Target, where: str) -> Iterable[Problem]:
        yield from self._problems(module, plan, target, where)
        if not self.whole and not repeated_blocks(module):
            reason = f"{type(module).__name__} declares no repeated blocks to compile"
            yield Problem(where, reason, 'Set "scope" to "whole", or remove it.')

    def _problems(self, module: torch.nn.Module | None, plan: Plan, target: Target, where: str) -> Iterator[Problem]:
        if self.dynamic and len(plan.variants) == 1:
            yield Problem(f"{where}.dynamic", "there is one variant, and so one size", "Remove it, or add sizes.")
        yield from self._flag_problems(module, target, where)
        if self.backend == "onnx":
            yield from self._missing(where, *onnx.EXPORTING, onnx.PACKAGE)
            yield from self._attention_problems(plan, where)
        elif self.backend == "tensorrt":
            yield from self._attention_problems(plan, where)
            yield from self._tensorrt_problems(module, target, where)
        elif target.device != "cpu":
            yield Problem(
                where,
                f"aot_inductor builds for CPUs only in this version, the target is {target.name}",
                "Choose a CPU target.",
            )

    def _missing(self, where: str, *names: str) -> Iterator[Problem]:
        if missing := [name for name in names if find_spec(name) is None]:
            reason = f"{', '.join(missing)}: not installed, and needed to export to ONNX and to try the engines"
            yield Problem(f"{where}.backend", reason, "pip install 'diffkiln[onnx]'")

    def _attention_problems(self, plan: Plan, where: str) -> Iterator[Problem]:
        if Fact("attention_chosen", self.component) in plan.facts:
            runner = _WHOLE[self.backend]
            reason = f"{runner} computes attention in its own way, whatever kernel attention_backend chose"
            yield Problem(where, reason, "Remove one of the two, or choose aot_inductor.")

    def _tensorrt_problems(self, module: torch.nn.Module | None, target: Target, where: str) -> Iterator[Problem]:
        """What library and target say, and the types of the weights."""
        at = f"{where}.backend"
        if target.device != "cuda":
            reason = f"TensorRT builds for NVIDIA's GPUs, the target is {target.name}"
            yield Problem(at, reason, "Choose a GPU as the target, or another backend.")
            return
        if target.capability < tensorrt.OLDEST:
            least = ".".join(map(str, tensorrt.OLDEST))
            reason = f"found compute capability {target.compute_capability} ({target.name}), required {least} or later"
            yield Problem(at, f"TensorRT: {reason}", "Choose another backend.")
            return
        yield from self._missing(where, *onnx.EXPORTING)
        library = tensorrt.library_for(target.capability)
        if find_spec(library.module) is None:
            yield Problem(at, *_library_missing(library, target))
        kinds = {str(p.dtype).removeprefix("torch.") for p in module.parameters()} if module else set()
        for reason in filter(None, (tensorrt.type_problem(kind, target.capability) for kind in sorted(kinds))):
            yield Problem(
                at, f"tensorrt cannot compute {self.component}: {reason} (its weights)", self._cast("float16")
            )

    def _cast(self, dtype: str) -> str:
        return f'Put {{"name": "cast", "component": "{self.component}", "dtype": "{dtype}"}} before it.'

    def check_recording(self, recording: Recording, target: Target, where: str) -> Iterable[Problem]:
        """Types that the backend cannot compute in."""
        module = recording.modules.get(self.component)
        if self.backend not in _WHOLE or module is None:
            return
        programs = (*(module.programs.values() if self.whole else ()), *module.regions.values())
        if self.backend == "onnx":
            reasons, mend = (reason for program in programs for reason in onnx.type_problems(program)), "float32"
        else:
            capability = target.capability
            reasons = (reason for program in programs for reason in tensorrt.type_problems(program, capability))
            mend = "float16"
        for reason in dict.fromkeys(reasons):
            told = f"{self.backend} cannot compute {self.component}: {reason}"
            yield Problem(f"{where}.backend", told, self._cast(mend))

    def _options(self) -> dict[str, Any]:
        """What the exporter is given."""
        options: dict[str, Any] = self._flags()
        if self.weights == "engine":
            options["weights"] = self.weights
        if self.weight_budget_gb is not None:
            options["weight_budget"] = int(self.weight_budget_gb * 1e9)
        return options

    def _flags(self) -> dict[str, bool]:
        return self.flags.model_dump(exclude_none=True) if self.flags else {}

    def _flag_problems(self, module: torch.nn.Module | None, target: Target, where: str) -> Iterator[Problem]:
        """Flags that would decide nothing."""
        for name, value in self._flags().items():
            at = f"{where}.flags.{name}"
            if name in Flags.gpu_only and target.device == "cpu":
                yield Problem(at, f"it is for Triton's kernels, and {target.name} has none", "Remove it.")
            elif name == "conv_1x1_as_mm" and value and not (module and _has_convolutions_of_one(module)):
                yield Problem(at, f"{self.component} has no convolution of one pixel", "Remove it.")

    def run(self, plan: Plan) -> Outcome:
        dynamic = plan.ranged if self.dynamic is None else self.dynamic
        request = CompileRequest(self.component, self.backend, self._options(), dynamic)
        plan = replace(plan.with_facts(self.provides()), compile=(*plan.compile, request))
        what = "whole" if self.whole else "blocks and what lies between" if self.between else "blocks"
        return Outcome(plan, True, (f"{'arithmetic' if self.component == SCHEDULER else what} by {self.backend}",))

    def apply(self, module: torch.nn.Module) -> Sequence[str]:
        return ()

    @property
    def rewrites(self) -> bool:
        return self.component == SCHEDULER

    def rewrite(self, recording: Recording) -> tuple[Recording, Sequence[str]]:
        """The recording with what is to be lowered as regions.

        Raises:
            ValueError: there is nothing to lower between the denoiser's calls.
        """
        if self.component == SCHEDULER:
            recording = between_calls(recording)
        elif (module := recording.modules.get(self.component)) and (self.whole or self.between):
            outlined = whole(module) if self.whole else between_blocks(module)
            recording = replace(recording, modules={**recording.modules, self.component: outlined})
        return recording, ()


#: The backends that lower whole components unless told otherwise, and what runs them.
_WHOLE = {"onnx": "ONNX Runtime", "tensorrt": "TensorRT"}


def _weight_conflicts(given: Mapping[str, Any]) -> Iterator[Conflict]:
    """Options of weights where they would decide nothing, or where an engine serves several blocks."""
    for name in ("weights", "weight_budget_gb"):
        if given.get(name) is not None and given.get("backend") != "tensorrt":
            yield (name,), refuse("only TensorRT's engines can hold weights", "Remove it, or choose tensorrt")
    if given.get("weights") == "engine" and given.get("scope") == "blocks":
        yield ("weights",), refuse("one engine serves every block of a class, and each has its own", "Remove it")
    if given.get("weight_budget_gb") is not None and given.get("weights") != "engine":
        mend = 'Set "weights" to "engine", or remove it: what the store holds is planned by runtime.offload'
        yield ("weight_budget_gb",), refuse("the engine has no weights of its own", mend)


def _library_missing(library: tensorrt.Library, target: Target) -> tuple[str, str]:
    """Why and what to do where the library that builds for a target is not installed."""
    reason = f"{target.name} ({target.sm}): found no package {library.package}, required to build for it"
    if library is tensorrt.RTX:
        return reason, library.install
    able = ", ".join(f"{major}.{minor}" for major, minor in sorted(tensorrt.RTX.portable))
    return f"{reason}, since {tensorrt.RTX.package} builds for {able} alone", (
        f"{library.install}, on a machine with that GPU, which {library.title} times its kernels on; or choose another "
        "target or backend."
    )


def _has_convolutions_of_one(module: torch.nn.Module) -> bool:
    kinds = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
    return any(isinstance(part, kinds) and set(part.kernel_size) == {1} for part in module.modules())
