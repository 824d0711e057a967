"""Complex numbers as pairs of real ones, for backends that have real types alone. No torch.

A complex tensor is then a real one with one dimension more, the last, of real and imaginary parts: what `view_as_real`
gives. Rotary embeddings need little of what can be done with complex numbers, and that little is a closed list.
"""

from __future__ import annotations

from collections.abc import Iterator

from diffkiln.program.ir import Op, Program, refs

#: The type of either part.
PARTS = {"complex64": "float32", "complex128": "float64"}

#: What `diffkiln.exporters._onnx.pairs` can do with complex numbers.
OPERATORS = frozenset(
    f"aten.{name}"
    for name in (
        "view_as_complex.default", "view_as_real.default", "real.default", "imag.default", "conj_physical.default",
        "resolve_conj.default", "mul.Tensor", "unsqueeze.default", "reshape.default", "view.default", "expand.default",
        "transpose.int", "permute.default", "slice.Tensor", "select.int", "cat.default", "contiguous.default",
        "clone.default",
    )
)  # fmt: skip


def touches_complex(op: Op, program: Program) -> bool:
    """Returns True if an operation takes or gives complex numbers."""
    names = (*(ref.name for ref in refs((op.args, op.kwargs))), *op.outputs)
    return any(program.types[name].dtype in PARTS for name in names if name in program.types)


def pair_problems(program: Program) -> Iterator[str]:
    """Yields each operator on complex numbers that has no form in pairs, once."""
    reported: set[str] = set()
    for op in program.ops:
        if op.name not in OPERATORS | reported and touches_complex(op, program):
            reported.add(op.name)
            short = sorted(name.removeprefix("aten.").partition(".")[0] for name in OPERATORS)
            yield f"found {op.name} of complex numbers, required one of {', '.join(short)}"
    for ref in program.outputs:
        if program.types[ref.name].dtype in PARTS:
            yield f"found {program.types[ref.name].dtype} as a result ({ref.name.lstrip('%')}), required real numbers"
