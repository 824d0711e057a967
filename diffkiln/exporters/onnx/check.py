"""What ONNX Runtime takes: types that it computes in, on a CPU or a GPU.

Found by trying ONNX Runtime 1.31 on a CPU: bfloat16 and the types of eight bits are kept, moved and cast there, and
nothing else; float16 is computed in float32 where it has no kernel. On a GPU the CUDA provider computes in bfloat16,
but lacks many kernels of it, so it counts as kept there, too. Complex numbers become pairs of real ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, ClassVar

from diffkiln.errors import Problem
from diffkiln.exporters._onnx.needs import EXPORTING, missing_modules
from diffkiln.exporters.base import Exporter
from diffkiln.exporters.flags import Flags
from diffkiln.exporters.options import UNBROKEN, WEIGHTLESS, Lacks, Options
from diffkiln.program import Program, refs
from diffkiln.program.pairs import PARTS, pair_problems
from diffkiln.spec import Runtime
from diffkiln.spec.targets import Target

#: What runs a model, with the versions that the tests ran with and later ones.
_RUNTIME, _VERSIONS = "onnxruntime", ">=1.31"

#: Types that a model can have, of those that ONNX has.
TYPES = (
    "float32", "uint8", "int8", "int16", "int32", "int64", "bool", "float16", "float64", "bfloat16", "float8_e4m3fn",
    "float8_e5m2",
)  # fmt: skip
#: Those that are kept and cast, and that nothing is computed in.
KEPT = frozenset({"bfloat16", "float8_e4m3fn", "float8_e5m2"})
_MOVES = frozenset(
    ("to", "_to_copy", "t", "transpose", "permute", "reshape", "view", "clone", "contiguous", "detach", "unsqueeze")
)


_FLAGLESS = Lacks("they are Inductor's, and ONNX Runtime has none of them", "Remove them")


class OnnxOptions(Options):
    """The options of the backend `onnx`: none."""

    fullgraph: Annotated[bool, UNBROKEN] = True
    flags: Annotated[Flags | None, _FLAGLESS] = None
    weights: Annotated[str | None, WEIGHTLESS] = None
    weight_budget_gb: Annotated[float | None, WEIGHTLESS] = None


class Onnx(Exporter):
    """The backend `onnx`. It has no options."""

    name: ClassVar[str] = "onnx"
    version: ClassVar[int] = 2
    builder = "diffkiln.exporters.onnx.build"
    summary = "writes ONNX, which ONNX Runtime runs with the bundle's weights."
    options = OnnxOptions
    whole = True
    packages: ClassVar = {_RUNTIME: _VERSIONS}
    examples: ClassVar = ({"name": "compile", "component": "text_encoder", "backend": name},)

    def refused_facts(self, options: Options) -> Mapping[str, Problem]:
        reason = "ONNX Runtime computes attention in its own way, and ignores attention_backend"
        return {"attention_chosen": Problem("", reason, "Remove one of the two, or choose aot_inductor.")}

    def machine_problems(self, target: Target) -> Iterator[Problem]:
        yield from missing_modules(*EXPORTING, _RUNTIME)

    def runtime_problems(self, options: Options, runtime: Runtime, where: str) -> Iterator[Problem]:
        if runtime.cuda_graphs is not None:
            reason = "ONNX Runtime waits for the GPU in each call, and a CUDA graph cannot hold that"
            hint = 'Choose another backend, or remove "cuda_graphs" from "runtime".'
            yield Problem(f"{where}.backend", reason, hint)

    def refused_types(self, program: Program, target: Target) -> Iterator[str]:
        yield from type_problems(program)


def type_problems(program: Program) -> Iterator[str]:
    """Yields the types that ONNX Runtime cannot take or compute in, each once, with their user."""
    reported: set[str] = set()
    for name, type_ in program.types.items():
        if PARTS.get(type_.dtype, type_.dtype) not in TYPES and type_.dtype not in reported:
            reported.add(type_.dtype)
            yield f"found {type_.dtype} ({name.lstrip('%@#')}), required one of {', '.join(TYPES)}"
    for op in program.ops:
        used = {program.types[ref.name].dtype for ref in refs((op.args, op.kwargs)) if ref.name in program.types}
        used |= {program.types[name].dtype for name in op.outputs}
        if op.is_aten and op.name.split(".")[1] in _MOVES:
            continue
        for dtype in sorted(used & KEPT - reported):
            reported.add(dtype)
            yield f"found {op.name} in {dtype}, required float32, float16 or float64: {dtype} is only kept and cast"
    yield from pair_problems(program)
