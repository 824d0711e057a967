"""Have the regions of a component lowered by a backend."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field

from diffkiln.errors import Problem
from diffkiln.passes.base import CompileRequest, Fact, Outcome, Pass, Plan
from diffkiln.passes.quantizers.bitsandbytes import BitsAndBytes
from diffkiln.spec import Target


class Compile(Pass):
    """Have the regions of a component lowered by a backend; what is not lowered is replayed operation by operation.

    With `scope` "blocks" a region is a repeated block: each class that diffusers declares in `_repeated_blocks`.
    """

    name: ClassVar[str] = "compile"
    summary: ClassVar[str] = "lower a component's repeated blocks ahead of time"
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
    )

    backend: Literal["aot_inductor"] = Field("aot_inductor", description="The backend that lowers the regions.")
    scope: Literal["blocks"] = Field("blocks", description="What a region is: a repeated block.")

    def provides(self) -> Iterable[Fact]:
        return [Fact("compiled", self.component, self.name)]

    def check_module(self, module: torch.nn.Module, plan: Plan, target: Target, where: str) -> Iterable[Problem]:
        if target.device != "cpu":
            yield Problem(
                where,
                f"aot_inductor builds for CPUs only in this version, the target is {target.name}",
                "Choose a CPU target.",
            )
        from diffkiln.record.components import repeated_blocks

        if not repeated_blocks(module):
            yield Problem(where, f"{type(module).__name__} declares no repeated blocks to compile", "Remove it.")

    def run(self, plan: Plan) -> Outcome:
        request = CompileRequest(self.component, self.backend)
        plan = replace(plan.with_facts(self.provides()), compile=(*plan.compile, request))
        return Outcome(plan, True, (f"blocks by {self.backend}",))

    def apply(self, module: torch.nn.Module) -> Sequence[str]:
        return ()
