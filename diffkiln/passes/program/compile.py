"""Have the regions of a component lowered by a backend."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from diffkiln.errors import Problem
from diffkiln.interpreter.layers import repeated_blocks
from diffkiln.passes.base import CompileRequest, Fact, Outcome, ProgramPass, State
from diffkiln.passes.compiling import BACKENDS, Asked, Backend
from diffkiln.passes.outlining import SCHEDULER, between_blocks, between_calls, whole
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


class Compile(ProgramPass):
    """Have the regions of a component lowered by a backend; what is not lowered is replayed operation by operation.

    With `scope` "blocks" a region is a repeated block: each class that diffusers declares in `_repeated_blocks`; with
    `between` also what lies between the blocks. With `scope` "whole" it is the whole component, whose weights are then
    all needed at once. The component `scheduler` is the arithmetic between the denoiser's calls.

    `aot_inductor` writes native code for a CPU or a GPU, which need not be in this machine. `onnx` writes ONNX, which
    ONNX Runtime runs with the bundle's weights. `tensorrt` has TensorRT build that ONNX into an engine for a GPU.
    `torch_compile` compiles when the bundle is loaded, out of the caches of a compilation when it was made.
    """

    name: ClassVar[str] = "compile"
    summary: ClassVar[str] = "compile a component ahead of time: its repeated blocks or all of it"
    after: ClassVar = {"*": "engines are built from what the other passes leave"}
    requires_not: ClassVar = {
        "uncompilable": "an earlier pass left layers that no engine can hold",
        "hooked_inside": "its hooks are inside the blocks, which engines replace. Choose a schedule that reuses whole "
        "blocks, or do not compile the component",
        "gguf": "GGUF's layers are unpacked by operations that an engine would repeat at every call. Quantize the "
        "original weights with torchao, or do not compile the component",
    }
    examples: ClassVar = (
        {"name": "compile", "component": "transformer", "backend": "aot_inductor", "scope": "blocks"},
        {"name": "compile", "component": "vae", "scope": "whole", "flags": {"conv_1x1_as_mm": True}},
        {"name": "compile", "component": "scheduler"},
        {"name": "compile", "component": "text_encoder", "backend": "onnx"},
        {"name": "compile", "component": "transformer", "backend": "tensorrt"},
        {"name": "compile", "component": "transformer", "backend": "torch_compile", "fullgraph": False},
    )

    backend: Literal["aot_inductor", "onnx", "tensorrt", "torch_compile"] = Field(
        "aot_inductor", description="Backend that compiles the regions."
    )
    scope: Literal["blocks", "whole"] | None = Field(
        None,
        description="Region to compile at once: each repeated block, or the whole component. Absent: whole for onnx, "
        "whole for tensorrt, blocks for the others.",
    )
    between: bool = Field(False, description="Also compile the operations between the blocks.")
    dynamic: bool | None = Field(
        None,
        description="Build one engine for all sizes of a region where possible, instead of one engine a size. Absent: "
        "true if the inputs give a range of sizes.",
    )
    fullgraph: bool = Field(True, description="Refuse a region that torch.compile would break into several graphs.")
    flags: Flags | None = Field(None, description="Flags of torch's Inductor, by its own names.")
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
        backend = BACKENDS.get(given.get("backend", "aot_inductor"), BACKENDS["aot_inductor"])
        if given.get("fullgraph") is False and backend.unbroken:
            yield ("fullgraph",), refuse(backend.unbroken, "Remove it")
        if given.get("between") and given.get("scope") != "blocks" and (given.get("scope") or backend.whole):
            yield ("between",), refuse("the whole component is one region already", "Remove it")
        if given.get("flags") and backend.flagless:
            yield ("flags",), refuse(f"they are Inductor's, and {backend.flagless}", "Remove them")
        yield from _weight_conflicts(given)
        if given.get("component") == SCHEDULER:
            for name in ("scope", "between"):
                if given.get(name):
                    yield (name,), refuse("a scheduler has no blocks", "Remove it")

    @property
    def whole(self) -> bool:
        """Whether the component is one region."""
        return self.scope == "whole" or (self.scope is None and self._backend.whole)

    @property
    def _backend(self) -> Backend:
        return BACKENDS[self.backend]

    def packages(self) -> dict[str, str]:
        return self._backend.packages()

    def provides(self) -> Iterable[Fact]:
        return [Fact("compiled", self.component, self.name)]

    def check(self, plan: State, target: Target, where: str) -> Sequence[Problem]:
        if self.component != SCHEDULER or SCHEDULER in plan.modules or plan.scheduler is None:
            return super().check(plan, target, where)
        return list(self._problems(None, plan, target, where))

    def check_module(self, module: torch.nn.Module, plan: State, target: Target, where: str) -> Iterable[Problem]:
        yield from self._problems(module, plan, target, where)
        if not self.whole and not repeated_blocks(module):
            reason = f"{type(module).__name__} declares no repeated blocks to compile"
            yield Problem(where, reason, 'Set "scope" to "whole", or remove it.')

    def _problems(self, module: torch.nn.Module | None, plan: State, target: Target, where: str) -> Iterator[Problem]:
        if self.dynamic and len(plan.variants) == 1:
            yield Problem(f"{where}.dynamic", "there is one variant, and so one size", "Remove it, or add sizes.")
        yield from self._flag_problems(module, target, where)
        yield from self._backend.problems(Asked(self.component, module, plan, target, where, self.fullgraph))

    def check_recording(self, recording: Recording, target: Target, where: str) -> Iterable[Problem]:
        if module := recording.modules.get(self.component):
            yield from self._backend.type_problems(self.component, module, target, self.whole, where)

    def _options(self) -> dict[str, Any]:
        """What the exporter is given."""
        options: dict[str, Any] = self._flags()
        if not self.fullgraph:
            options["fullgraph"] = False
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

    def run(self, plan: State) -> Outcome:
        dynamic = plan.ranged if self.dynamic is None else self.dynamic
        request = CompileRequest(self.component, self.backend, self._options(), dynamic)
        plan = replace(plan.with_facts(self.provides()), compile=(*plan.compile, request))
        what = "whole" if self.whole else "blocks and what lies between" if self.between else "blocks"
        return Outcome(plan, True, (f"{'arithmetic' if self.component == SCHEDULER else what} by {self.backend}",))

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


def _has_convolutions_of_one(module: torch.nn.Module) -> bool:
    kinds = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
    return any(isinstance(part, kinds) and set(part.kernel_size) == {1} for part in module.modules())


PLUGIN = Compile
