"""Tensors that a recording folded."""

from __future__ import annotations

import hashlib

import torch
from torch.utils._python_dispatch import _disable_current_modes

from diffkiln.aten import dtype_name


class Constants:
    """Tensors by the digest of their content; shared by all programs of a bundle."""

    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}

    def add(self, tensor: torch.Tensor) -> str:
        """Keep a copy of a real tensor; gives its key. The same content, dtype and shape give the same key."""
        with _disable_current_modes():
            data = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor)
            return self._add(data)

    def add_joined(self, first: str, second: str) -> str:
        """Keep two constants as one, the rows of the second after those of the first; gives its key."""
        return self.add(torch.cat([self.tensors[first], self.tensors[second]]))

    def _add(self, data: torch.Tensor) -> str:
        head = f"{dtype_name(data.dtype)}{tuple(data.shape)}".encode()
        body = data.reshape(-1).view(torch.uint8).numpy().tobytes() if data.numel() else b""
        key = hashlib.blake2b(head + body, digest_size=12).hexdigest()
        self.tensors.setdefault(key, data)
        return key
