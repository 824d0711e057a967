"""The mistakes that `mistakes` makes, in the block that is written by hand (tests/exporters/regions.py)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mistake:
    """A change of the one place that a pattern finds first.

    Attributes:
        kernel: a part of the kernel's name; empty for the C++.
        found: a part of the message that it must lead to.
    """

    pattern: str
    text: str
    found: str
    kernel: str = ""


_NORM = "native_layer_norm"
_WRONG = r"differs from its replay"

#: For the block that is written by hand (tests/exporters/regions.py).
MISTAKES = {
    "a row is read from another one's place": Mistake(
        r"tl\.load\(in_ptr0 \+ \(r0_1 \+ 32\*x0\)",
        "tl.load(in_ptr0 + (r0_1 + 32*(x0 + (x0 == 5).to(tl.int32)))",
        _WRONG,
        _NORM,
    ),
    "a load goes beyond the end": Mistake(
        r"tl\.load\(in_ptr0 \+ \(r0_1 \+ 32\*x0\)",
        "tl.load(in_ptr0 + (r0_1 + 32*(x0 + 1))",
        "a load out of bounds",
        _NORM,
    ),
    "a load begins before the tensor": Mistake(
        r"tl\.load\(in_ptr1 \+ \(r0_1\)", "tl.load(in_ptr1 + (r0_1 - 1)", "a load out of bounds", _NORM
    ),
    "a store goes beyond the end": Mistake(
        r"tl\.store\(out_ptr2 \+ \(r0_1 \+ 32\*x0\)",
        "tl.store(out_ptr2 + (r0_1 + 32*x0 + 32)",
        "a store out of bounds",
        _NORM,
    ),
    "a mean is not taken away": Mistake(r"tmp17 = tmp1 - tmp10", "tmp17 = tmp1", _WRONG, _NORM),
    "a grid is one too small": Mistake(r"uint32_t grid_0 = xnumel;", "uint32_t grid_0 = xnumel - 1;", "not finite"),
    "a product is not computed": Mistake(
        r"AOTI_TORCH_ERROR_CODE_CHECK\(aoti_torch_cpu_addmm_out\(buf.*\n", "\n", "not finite"
    ),
    "a kernel is not launched": Mistake(r"call_engine_triton_poi_fused_gelu\w+\(buf.*\n", "\n", _WRONG),
    "a kernel's arguments change places": Mistake(
        r"(call_engine_triton_poi_fused_add_mul_view_1\(buf\d+, )(arg\d+_1), (arg\d+_1)", r"\1\3, \2", "out of bounds"
    ),
    "values are read in the place of keys": Mistake(r"(int_array_\d+, int_array_\d+, )32L", r"\g<1>64L", _WRONG),
    "attention's view begins at an odd place": Mistake(
        r"(int_array_\d+, int_array_\d+, )32L", r"\g<1>33L", "not of 16 bytes"
    ),
    "attention has another scale": Mistake(r"double (var_\d+) = 0\.25;", r"double \1 = 0.5;", "asks for no"),
    "attention is causal": Mistake(r"(twin_flash_attention\(.*, 0\.0, )0, ", r"\g<1>1, ", "asks for no"),
}
