"""torch's types of elements, and its memory formats and layouts, by name.

The tables are closed: a name that a bundle or a source states is looked up here, and never as an attribute of torch.
"""

from __future__ import annotations

import torch

from diffkiln.errors import VerifyError

_PLAIN = (
    torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int8, torch.int16, torch.int32,
    torch.int64,
    torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex32, torch.complex64, torch.complex128,
    torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz, torch.float8_e8m0fnu,
    torch.float4_e2m1fn_x2,
)  # fmt: skip
DTYPES: dict[str, torch.dtype] = {str(dtype).removeprefix("torch."): dtype for dtype in _PLAIN}

#: What programs call memory formats and layouts.
FORMATS: dict[str, torch.memory_format | torch.layout] = {
    "contiguous_format": torch.contiguous_format,
    "preserve_format": torch.preserve_format,
    "channels_last": torch.channels_last,
    "channels_last_3d": torch.channels_last_3d,
    "strided": torch.strided,
}


def dtype_of(name: str) -> torch.dtype:
    """Returns the dtype of this name.

    Raises:
        VerifyError: There is no such dtype.
    """
    try:
        return DTYPES[name]
    except (KeyError, TypeError):
        raise VerifyError(f"torch has no dtype {str(name)[:100]!r}") from None


def format_of(name: str) -> torch.memory_format | torch.layout:
    """Returns the memory format or the layout of this name.

    Raises:
        VerifyError: There is no such format.
    """
    if name not in FORMATS:
        raise VerifyError(f"programs know no memory format or layout {name[:100]!r}, only {', '.join(FORMATS)}")
    return FORMATS[name]
