"""How precisely a GPU multiplies float32 matrices, while a pipeline runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def float32_precision(tf32: bool | None) -> Iterator[None]:
    """Sets whether float32 products and convolutions are computed in TF32, inside the `with` block.

    None leaves torch's settings alone. They belong to the process: other threads see them too.
    """
    if tf32 is None:
        yield
        return
    backends: Any = torch.backends
    homes = (backends.cuda.matmul, backends.cudnn.conv)
    before = [home.fp32_precision for home in homes]
    for home in homes:
        home.fp32_precision = "tf32" if tf32 else "ieee"
    try:
        yield
    finally:
        for home, setting in zip(homes, before, strict=True):
            home.fp32_precision = setting
