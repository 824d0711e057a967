"""Tensors that a recording folded."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch.utils._python_dispatch import _disable_current_modes

from diffkiln.interpreter.aten import dtype_name

#: Bytes from which on a tensor is compared before it is hashed.
_LARGE = 2**16


class Constants:
    """Tensors by the digest of their content; shared by all programs of a bundle.

    Args:
        tensors: those that are known already, by their digests.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor] = MappingProxyType({})) -> None:
        self.tensors = dict(tensors)
        self._known: dict[int, tuple[weakref.ref[torch.Tensor], str]] = {}

    def add(self, tensor: torch.Tensor) -> str:
        """Keep a copy of a real tensor; gives its key. The same content, dtype and shape give the same key."""
        with _disable_current_modes():
            if key := self._still(tensor):
                return key
            data = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor)
            key = self._add(data)
            self._known[id(tensor)] = weakref.ref(tensor), key
            return key

    def _still(self, tensor: torch.Tensor) -> str:
        """The key of a large tensor that was added before and has the same bits now; "" where it is not one.

        Every block of a model may get the same table, and to compare costs a tenth of what hashing does.
        """
        reference, key = self._known.get(id(tensor), (None, ""))
        if reference is None or reference() is not tensor or tensor.nbytes < _LARGE:
            return ""
        if not tensor.is_contiguous() or tensor.is_conj() or tensor.is_neg():  # its memory is not what it is read as
            return ""
        kept = self.tensors[key]
        return key if tensor.shape == kept.shape and torch.equal(_bits(tensor), _bits(kept)) else ""

    def add_joined(self, first: str, second: str) -> str:
        """Keep two constants as one, the rows of the second after those of the first; gives its key."""
        return self.add(torch.cat([self.tensors[first], self.tensors[second]]))

    def _add(self, data: torch.Tensor) -> str:
        head = f"{dtype_name(data.dtype)}{tuple(data.shape)}".encode()
        digest = hashlib.blake2b(head, digest_size=12)
        if data.numel():
            digest.update(_bits(data).numpy().data)
        key = digest.hexdigest()
        self.tensors.setdefault(key, data)
        return key


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)
