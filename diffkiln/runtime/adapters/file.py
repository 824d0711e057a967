"""The file of an adapter: its table is checked against the bundle before a tensor is read, and numbers after."""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from diffkiln.errors import CallError, ManifestInvalid
from diffkiln.guards.limits import active
from diffkiln.runtime.finite import all_finite
from diffkiln.runtime.tables import Entry, entries_of, read_table

_PICKLES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl"})
#: How zip files, which torch.save writes, and pickles begin.
_MAGIC = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
#: The key under which diffusers saves PEFT's configuration of an adapter.
CONFIGURATION = "lora_adapter_metadata"


@dataclass(frozen=True)
class AdapterFile:
    """A safetensors file that is open, with its table.

    Attributes:
        name: For messages.
        entries: Its tensors by name.
        metadata: PEFT's configuration, by keys such as `transformer.lora_alpha`; empty without any.
    """

    name: str
    entries: Mapping[str, Entry]
    metadata: Mapping[str, Any]
    descriptor: int
    offset: int
    nbytes: int

    def tensors(self) -> dict[str, torch.Tensor]:
        """Reads all tensors, as they lie in the file, into one piece of memory.

        Raises:
            CallError: The file ends early, or a number is not finite.
        """
        flat = torch.empty(self.nbytes, dtype=torch.uint8)
        view = memoryview(flat.numpy().data) if self.nbytes else memoryview(b"")
        _fill(self.descriptor, view, self.offset, self.name)
        found = {name: entry.of(flat[entry.start : entry.end]) for name, entry in self.entries.items()}
        if all_finite(found.values()):  # a sum is not finite if a term is not; it may overflow where none is
            return found
        for name, tensor in found.items():
            if not torch.isfinite(tensor).all():
                wrong = int((~torch.isfinite(tensor)).sum())
                raise CallError(
                    f"load_lora: {self.name}: {wrong} of {tensor.numel()} numbers of {name} are not finite. The file "
                    "is damaged, or its training failed: get another"
                )
        return found

    def close(self) -> None:
        os.close(self.descriptor)


def open_file(path: Path) -> AdapterFile:
    """Opens the file of an adapter and reads its table.

    Raises:
        CallError: It is not there, or is no safetensors file of floating-point numbers.
        LimitExceeded: It has more bytes, or its table more rows, than the limits allow.
    """
    if path.suffix.lower() in _PICKLES:
        raise _pickled(path.name)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise CallError(f"load_lora: {path} cannot be read: {error.strerror}. Give a safetensors file") from None
    try:
        return _opened(descriptor, path)
    except BaseException:
        os.close(descriptor)
        raise


def _opened(descriptor: int, path: Path) -> AdapterFile:
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        raise CallError(f"load_lora: {path} is not a file. Give a safetensors file")
    active().check("adapter_bytes", status.st_size, path.name)
    if os.pread(descriptor, 4, 0).startswith(_MAGIC):
        raise _pickled(path.name)
    try:
        table, length = read_table(path.name, status.st_size, partial(_pread, descriptor, path.name))
        entries = entries_of(table, status.st_size - 8 - length, path.name)
    except ManifestInvalid as error:
        raise CallError(f"load_lora: this is no safetensors file of an adapter: {error}") from None
    strange = next((name for name, entry in entries.items() if not _is_plain(entry)), None)
    if strange is not None:
        raise CallError(
            f"load_lora: {path.name}: {strange} is {entries[strange].dtype}, and factors are floating-point numbers of "
            "at least 16 bits. Save the adapter in bfloat16"
        )
    described = _configuration(table.get("__metadata__"), path.name)
    return AdapterFile(path.name, entries, described, descriptor, 8 + length, status.st_size - 8 - length)


def _is_plain(entry: Entry) -> bool:
    return entry.dtype.is_floating_point and entry.dtype.itemsize >= 2


def _configuration(metadata: Any, name: str) -> Mapping[str, Any]:
    text = metadata.get(CONFIGURATION) if isinstance(metadata, dict) else None
    if text is None:
        return {}
    try:
        found = json.loads(text)
    except (ValueError, TypeError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise CallError(f"load_lora: {name}: {CONFIGURATION} in its header is no JSON object. Save the adapter again")
    return found


def _pickled(name: str) -> CallError:
    return CallError(
        f"load_lora: {name} is a pickle, which can run code that it carries, so it is not read. Get the adapter as "
        "safetensors, or convert it on a machine that holds nothing of value"
    )


def _pread(descriptor: int, name: str, size: int, offset: int) -> bytes:
    buffer = bytearray(size)
    _fill(descriptor, memoryview(buffer), offset, name)
    return bytes(buffer)


def _fill(descriptor: int, view: memoryview, offset: int, name: str) -> None:
    while view:
        count = os.preadv(descriptor, [view], offset)
        if count == 0:
            raise CallError(f"load_lora: {name} was cut while it was read. Try again")
        view, offset = view[count:], offset + count


@dataclass(frozen=True)
class Alphas:
    """The numbers by which an adapter's factors are multiplied, besides its scale.

    Where diffusers saved PEFT's configuration, these are its `lora_alpha` over the rank, or over the rank's root.
    """

    metadata: Mapping[str, Any]
    name: str

    def factor(self, component: str, layer: str, rank: int) -> float:
        """Returns alpha / rank of a layer whose file has no alpha; 1 without a configuration.

        Raises:
            CallError: The configuration asks for DoRA, or its alpha is no number.
        """
        own = dict(self._of(component))
        if not own:
            return 1.0
        if own.get("use_dora"):
            raise CallError(f"load_lora: {self.name} is an adapter of DoRA. {DORA}")
        patterns: Any = own.get("alpha_pattern") or {}
        alpha = next((value for pattern, value in _items(patterns) if _names(pattern, layer)), own.get("lora_alpha"))
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
            raise CallError(f"load_lora: {self.name}: the lora_alpha of {layer} is no number. Save the adapter again")
        return alpha / (math.sqrt(rank) if own.get("use_rslora") else rank)

    def _of(self, component: str) -> Iterator[tuple[str, Any]]:
        prefix = f"{component}."
        for key, value in self.metadata.items():
            if key.startswith(prefix):
                yield key.removeprefix(prefix), value


#: What to do with an adapter of DoRA.
DORA = "Merge it into the weights before you compile, by the pass fuse_lora"


def _items(patterns: Any) -> list[tuple[str, Any]]:
    return [(str(key), value) for key, value in patterns.items()] if isinstance(patterns, dict) else []


def _names(pattern: str, layer: str) -> bool:
    """Returns True if a pattern of PEFT's means a layer: its whole name, or the end of it after a dot.

    PEFT's patterns are regular expressions. Those of a stranger could take for ever, and none that diffusers saves is
    more than a name after `^`.
    """
    name = pattern.removeprefix("^").removesuffix("$").replace("\\.", ".")
    return layer == name or (not pattern.startswith("^") and layer.endswith(f".{name}"))
