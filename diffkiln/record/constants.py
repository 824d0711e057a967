"""Tensors that a recording folded."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch.utils._python_dispatch import _disable_current_modes

from diffkiln.interpreter.aten import dtype_name, dtype_of
from diffkiln.program import TensorType

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
        """Keeps a copy of a real tensor and returns its key. The same content, dtype and shape give the same key."""
        with _disable_current_modes():
            if key := self._still(tensor):
                return key
            data = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor)
            key = self._add(data)
            self._known[id(tensor)] = weakref.ref(tensor), key
            return key

    def _still(self, tensor: torch.Tensor) -> str:
        """Returns the key of a large tensor that was added before with the same bits; "" for any other.

        Every block of a model may get the same table, and comparing takes a tenth of the time of hashing.
        """
        reference, key = self._known.get(id(tensor), (None, ""))
        if reference is None or reference() is not tensor or tensor.nbytes < _LARGE:
            return ""
        if not tensor.is_contiguous() or tensor.is_conj() or tensor.is_neg():  # its memory is not what it is read as
            return ""
        kept = self.tensors[key]
        return key if tensor.shape == kept.shape and torch.equal(_bits(tensor), _bits(kept)) else ""

    def add_joined(self, first: str, second: str) -> str:
        """Keeps two constants as one, the second's rows after the first's, and returns its key."""
        return self.add(torch.cat([self.tensors[first], self.tensors[second]]))

    def add_later(self, what: str, type_: TensorType) -> str:
        """Returns the key of a tensor that is not known yet: a digest of `what` it is. Until then zeros stand there."""
        key = hashlib.blake2b(what.encode(), digest_size=12).hexdigest()
        with _disable_current_modes():
            self.tensors.setdefault(key, torch.zeros((), dtype=dtype_of(type_.dtype)).expand(type_.shape))
        return key

    def fill(self, key: str, tensor: torch.Tensor) -> None:
        """Keeps a copy of the tensor that is known now."""
        self.tensors[key] = tensor.detach().clone(memory_format=torch.contiguous_format)

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
