"""What OpenVINO takes: components or their blocks, on a CPU, in float32 or computed in bfloat16.

OpenVINO arranges weights for its kernels: once where the model holds them, in every call where they are inputs. So the
engine of a whole component holds its weights, unless the spec says otherwise. One engine serves all blocks of a class,
whose weights differ, so there they are inputs. OpenVINO computes float64 in float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import metadata
from importlib.util import find_spec
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field

from diffkiln.bundle.openvino import INSTALL, PACKAGE, Holder, Mode, Precision, WeightFormat
from diffkiln.errors import Problem
from diffkiln.exporters._onnx.needs import EXPORTING
from diffkiln.exporters._onnx.types import refused_of
from diffkiln.exporters.base import Exporter
from diffkiln.exporters.flags import Flags
from diffkiln.exporters.options import UNBROKEN, Lacks, Options
from diffkiln.program import Program
from diffkiln.spec import Conflict, Runtime, refuse
from diffkiln.spec.targets import Target

#: The distribution that compresses weights, and the extra that installs it beside the compiler and OpenVINO.
NNCF, NNCF_INSTALL = "nncf", "pip install 'diffkiln[nncf]'"
#: Types that a region's values may have.
TYPES = ("float32", "float64", "uint8", "int8", "int16", "int32", "int64", "bool")
#: The only level of the psABI whose CPUs may compute in bfloat16 (AVX512-BF16 or AMX; neither is part of the level).
_WITH_BFLOAT16 = "x86-64-v4"

_FLAGLESS = Lacks("they are Inductor's, and OpenVINO has none of them", "Remove them")
_UNLIMITED = Lacks("OpenVINO keeps all weights of an engine in memory")
_Threads = Annotated[int, Field(ge=1, le=4096)]


class OpenvinoOptions(Options):
    """Precision, threads and streams of an engine, and the place of its weights."""

    lowers: ClassVar = (
        "weights", "inference_precision", "performance_mode", "threads", "streams", "weight_format", "group_size",
    )  # fmt: skip

    fullgraph: Annotated[bool, UNBROKEN] = True
    flags: Annotated[Flags | None, _FLAGLESS] = None
    weight_budget_gb: Annotated[float | None, _UNLIMITED] = None
    weights: Holder | None = Field(
        None,
        description="For openvino. input: the bundle passes the weights to the engine. engine: the engine holds them. "
        "Absent: engine for a whole component, input for blocks.",
    )
    inference_precision: Precision | None = Field(
        None,
        description="For openvino. bf16: compute in bfloat16, on CPUs that have it (target x86-64-v4). Absent: f32.",
    )
    performance_mode: Mode | None = Field(
        None, description="For openvino. throughput: several calls at a time, each slower. Absent: latency."
    )
    threads: _Threads | None = Field(None, description="For openvino: threads of an engine. Absent: as many as torch.")
    streams: _Threads | None = Field(None, description="For openvino: calls that run at a time. Absent: 1 for latency.")

    weight_format: WeightFormat | None = Field(
        None,
        description="For openvino. int8 or int4: NNCF stores the weights that the engine holds in so many bits. "
        "Absent: as they are.",
    )
    group_size: Annotated[int, Field(ge=32, le=4096)] | None = Field(
        None, description="For openvino, int4: weights of a row that share a scale. Absent: 128."
    )

    @classmethod
    def conflicts(cls, given: Mapping[str, Any]) -> Iterator[Conflict]:
        """Yields weights in an engine for several blocks, and fewer bits for weights that are in no engine."""
        yield from super().conflicts(given)
        blocks = given.get("scope") == "blocks"
        if blocks and given.get("weights") == "engine":
            yield ("weights",), refuse("one engine serves every block of a class, and each has its own", "Remove it")
        if given.get("weight_format") and (blocks or given.get("weights") == "input"):
            reason = "the bundle passes the weights to the engine, and NNCF compresses those that an engine holds"
            yield ("weight_format",), refuse(reason, "Remove it, or compile the whole component with its weights")
        if given.get("group_size") and given.get("weight_format") != "int4":
            reason = "only weights of four bits share scales by groups"
            yield ("group_size",), refuse(reason, 'Remove it, or write "weight_format": "int4"')

    def lowered(self) -> dict[str, Any]:
        """Returns the options that the spec states, and the place of the weights."""
        stated = {name: getattr(self, name) for name in self.lowers}
        if self.weights is None:
            stated["weights"] = "input" if getattr(self, "scope", None) == "blocks" else "engine"
        return {name: value for name, value in stated.items() if value is not None}

    def problems(self, component: str, module: torch.nn.Module | None, target: Target, where: str) -> Iterator[Problem]:
        """Yields arithmetic without weights, and bfloat16 for a target whose CPUs lack it."""
        if module is None:
            reason = f"{component} has no weights, and OpenVINO is only worth its call for a model that has some"
            yield Problem(f"{where}.backend", reason, "Choose aot_inductor.")
        if self.inference_precision == "bf16" and target.device == "cpu" and target.isa != _WITH_BFLOAT16:
            reason = f"found bf16 for {target.name}, whose CPUs compute in no bfloat16, required f32"
            hint = f'Remove it, or choose the target {{"device": "cpu", "isa": "{_WITH_BFLOAT16}"}}.'
            yield Problem(f"{where}.inference_precision", reason, hint)
        if self.weight_format and find_spec(NNCF) is None:
            yield Problem(f"{where}.weight_format", f"{NNCF} is not installed, and compresses weights", NNCF_INSTALL)


def _exactly() -> str:
    """Returns the specifier of the version that is installed here, which alone runs what it made."""
    try:
        return f"=={metadata.version(PACKAGE)}"
    except metadata.PackageNotFoundError:  # then nothing is built either
        return ""


class Openvino(Exporter):
    """The backend `openvino`."""

    name: ClassVar[str] = "openvino"
    version: ClassVar[int] = 1
    builder = "diffkiln.exporters.openvino.build"
    summary = "has OpenVINO compile a component for CPUs."
    options = OpenvinoOptions
    whole = True
    packages: ClassVar = {PACKAGE: _exactly()}
    examples: ClassVar = ({"name": "compile", "component": "vae", "backend": name},)

    def holds_weights(self, options: Mapping[str, Any]) -> bool:
        return options.get("weights") == "engine"

    def target_problems(self, target: Target) -> Iterator[Problem]:
        if target.device != "cpu":
            reason = f"engines of OpenVINO run on CPUs, the target is {target.name}"
            yield Problem("", reason, 'Choose the target {"device": "cpu"}, or another backend.')

    def refused_facts(self, options: Options) -> Mapping[str, Problem]:
        reason = "OpenVINO computes attention in its own way, and ignores attention_backend"
        refused = {"attention_chosen": Problem("", reason, "Remove one of the two, or choose aot_inductor.")}
        reason = "another pass has stored the weights in a type of eight bits that OpenVINO does not take"
        refused["stored_smaller"] = Problem(".backend", reason, "Remove one of the two, or choose aot_inductor.")
        if options.lowered().get("weight_format"):
            reason = "another pass has already stored the weights in fewer bits"
            refused["quantized"] = Problem(".weight_format", reason, "Remove one of the two.")
        return refused

    def machine_problems(self, target: Target) -> Iterator[Problem]:
        if missing := [name for name in (*EXPORTING, PACKAGE) if find_spec(name) is None]:
            reason = f"{', '.join(missing)}: not installed, and needed to build and to try engines of OpenVINO"
            yield Problem("", reason, INSTALL)

    def runtime_problems(self, options: Options, runtime: Runtime, where: str) -> Iterator[Problem]:
        if runtime.on_incompatible == "eager" and self.holds_weights(options.lowered()):
            reason = "the weights are in the engine, and without it the component cannot be replayed"
            hint = 'Set it to "input", or remove "on_incompatible": "eager" from "runtime".'
            yield Problem(f"{where}.weights", reason, hint)

    def refused_type(self, dtype: str, target: Target) -> str | None:
        return _refusal(dtype)

    def refused_types(self, program: Program, target: Target) -> Iterator[str]:
        yield from type_problems(program)


def type_problems(program: Program) -> Iterator[str]:
    """Returns the types of a program that OpenVINO is not given, each once, with their user."""
    return refused_of(program, _refusal)


def _refusal(dtype: str) -> str | None:
    """Returns why a type is not taken, found against required; None if it is."""
    return None if dtype in TYPES else f"found {dtype}, required one of {', '.join(TYPES)}"
