"""ONNX and ONNX Runtime: what of a program they can take. No torch, and neither package.

Found by trying ONNX Runtime 1.31 on a CPU: bfloat16 and the types of eight bits are kept, moved and cast there, and
nothing else; float16 is computed in float32 where it has no kernel. On a GPU the CUDA provider computes in bfloat16,
but lacks many kernels of it, so it counts as kept there, too. Complex numbers become pairs of real ones.
"""

from __future__ import annotations

from collections.abc import Iterator

from diffkiln.program.ir import Program, refs
from diffkiln.program.pairs import PARTS, pair_problems

#: Package: versions that the tests ran with, and later ones. One of `DISTRIBUTIONS` will do.
PACKAGE, VERSIONS = "onnxruntime", ">=1.31"
#: Distributions that bring the module `onnxruntime`, by what they are for.
DISTRIBUTIONS = ("onnxruntime", "onnxruntime-gpu")
#: What exporting needs beside it, as modules.
EXPORTING = ("onnx", "onnxscript")
#: The version of ONNX's operators. Later ones are for later runtimes.
OPSET = 21

#: Types by the number that ONNX gives them (TensorProto.DataType).
NUMBERS = {
    "float32": 1, "uint8": 2, "int8": 3, "int16": 5, "int32": 6, "int64": 7, "bool": 9, "float16": 10, "float64": 11,
    "bfloat16": 16, "float8_e4m3fn": 17, "float8_e5m2": 19,
}  # fmt: skip
#: Those that are kept and cast, and that nothing is computed in.
KEPT = frozenset({"bfloat16", "float8_e4m3fn", "float8_e5m2"})
_MOVES = frozenset(
    ("to", "_to_copy", "t", "transpose", "permute", "reshape", "view", "clone", "contiguous", "detach", "unsqueeze")
)


def type_problems(program: Program) -> Iterator[str]:
    """The types that ONNX Runtime cannot take or compute in, each once, with who uses it."""
    told: set[str] = set()
    for name, type_ in program.types.items():
        if PARTS.get(type_.dtype, type_.dtype) not in NUMBERS and type_.dtype not in told:
            told.add(type_.dtype)
            yield f"found {type_.dtype} ({name.lstrip('%@#')}), required one of {', '.join(NUMBERS)}"
    for op in program.ops:
        used = {program.types[ref.name].dtype for ref in refs((op.args, op.kwargs)) if ref.name in program.types}
        used |= {program.types[name].dtype for name in op.outputs}
        if op.is_aten and op.name.split(".")[1] in _MOVES:
            continue
        for dtype in sorted(used & KEPT - told):
            told.add(dtype)
            yield f"found {op.name} in {dtype}, required float32, float16 or float64: {dtype} is only kept and cast"
    yield from pair_problems(program)
