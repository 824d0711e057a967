"""What torch.compile takes: everything, on a machine like the one that it compiles on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field

from diffkiln.errors import Problem
from diffkiln.exporters.base import Exporter, foreign, unknown_options
from diffkiln.exporters.flags import FLAGS, Inductors
from diffkiln.exporters.here import why_not_here
from diffkiln.exporters.options import Options
from diffkiln.program import Program
from diffkiln.spec.targets import Target


class TorchCompileOptions(Inductors):
    """Inductor's flags, and whether breaks are refused."""

    lowers: ClassVar = (*FLAGS, "fullgraph")

    fullgraph: bool = Field(True, description="Refuse a region that torch.compile would break into several graphs.")

    def lowered(self) -> dict[str, Any]:
        return super().lowered() | ({} if self.fullgraph else {"fullgraph": False})


class TorchCompile(Exporter):
    """The backend `torch_compile`."""

    name: ClassVar[str] = "torch_compile"
    builder = "diffkiln.exporters.torch_compile.build"
    complete = False
    summary = "compiles when the bundle is loaded, out of the caches of a compilation when it was made."
    options = TorchCompileOptions
    examples: ClassVar = ({"name": "compile", "component": "transformer", "backend": name, "fullgraph": False},)

    def may_break(self, options: Mapping[str, Any]) -> bool:
        return not options.get("fullgraph", True)

    def refused_facts(self, options: Options) -> Mapping[str, Problem]:
        if self.may_break(options.lowered()):
            return {}
        reason = "the graph of a block breaks where a package computes the attention"
        hint = 'Set "fullgraph" to false, or choose a native kernel.'
        return {"attention_by_package": Problem(".fullgraph", reason, hint)}

    def check(self, region: Program, target: Target, options: Mapping[str, Any]) -> list[Problem]:
        problems = unknown_options(options, self.options.lowers)
        if reason := why_not_here(target):
            hint = f"Build on a machine that is {target.name}, or choose aot_inductor."
            problems.append(Problem("$.target", f"torch_compile compiles where it runs, and {reason}", hint))
        breaks = foreign(region)
        if breaks and not self.may_break(options):
            hint = 'Set "fullgraph" to false, or choose one of torch\'s own kernels.'
            problems.append(Problem("$.fullgraph", f"the graph breaks at {', '.join(breaks)}", hint))
        return problems
