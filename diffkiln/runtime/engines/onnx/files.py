"""What an ONNX file refers to, read from its bytes: neither onnx nor protobuf is needed where a bundle runs.

A tensor of a model may lie in another file, which the model names. ONNX Runtime opens that file, so its name is looked
at before: it must be a plain file below the model's folder. Reading the file to its end also shows whether it is whole.

Field numbers: onnx/onnx.proto of ONNX 1.23; wire format: https://protobuf.dev/programming-guides/encoding.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath

from diffkiln.errors import Incompatible, Incomplete, PathEscape

#: Message: the fields that lead to tensors, by number, with the message that each holds.
_WAYS: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
}
_GRAPH, _KEY, _VALUE = 7, 1, 2
#: Protobuf's own limit of nesting.
_DEEPEST = 100


def check_files(model: Path) -> None:
    """Refuses a model that is cut short, or that refers to files outside its folder.

    Raises:
        Incomplete: the file, or one that it refers to, is missing or too short.
        Incompatible: it is not an ONNX model.
        PathEscape: it refers to a file outside its folder, or to one that is not plain.
    """
    if not model.is_file():
        raise Incomplete(f"{model.parent}: the file {model.name} is missing")
    data = memoryview(model.read_bytes())
    try:
        if not any(number == _GRAPH for number, _ in _fields(data)):
            raise Incompatible(f"{model}: found no graph, required an ONNX model")
        for entries in _external(data, "model", 0):
            _check_reference(model, entries)
    except _Cut as cut:
        raise Incomplete(f"{model}: the model is cut short or damaged: {cut}") from None


class _Cut(Exception):
    """An error for a message that ends too early."""


def _external(message: memoryview, kind: str, depth: int) -> Iterator[dict[str, str]]:
    """Yields where tensors lie outside, by the keys location, offset and length."""
    if depth > _DEEPEST:
        raise _Cut(f"found messages nested more than {_DEEPEST} deep")
    ways, entries = _WAYS[kind], dict[str, str]()
    for number, content in _fields(message):
        inner = ways.get(number)
        if inner == "entry":
            texts = {field: bytes(text).decode("utf-8", "replace") for field, text in _fields(content)}
            entries[texts.get(_KEY, "")] = texts.get(_VALUE, "")
        elif inner:
            yield from _external(content, inner, depth + 1)
    if entries:
        yield entries


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Yields the fields of a message that hold bytes, by their numbers; skips others."""
    at, empty = 0, memoryview(b"")
    while at < len(message):
        tag, at = _varint(message, at)
        wire = tag & 7
        if wire == 0:
            _, at = _varint(message, at)
            continue
        if wire not in (1, 2, 5):
            raise _Cut(f"found a field of wire type {wire}, which ONNX lacks")
        length, at = _varint(message, at) if wire == 2 else ({1: 8, 5: 4}[wire], at)
        if at + length > len(message):
            raise _Cut(f"found {len(message) - at} bytes of a field, required {length}")
        if wire == 2:
            yield tag >> 3, message[at : at + length] if length else empty
        at += length


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    """Returns a whole number and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(message):
            raise _Cut("it ends within a number")
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise _Cut("found a number of more than 64 bits")


def _check_reference(model: Path, entries: dict[str, str]) -> None:
    location = entries.get("location", "")
    posix, windows = PurePosixPath(location), PureWindowsPath(location)
    parts = {*posix.parts, *windows.parts}
    if not location or "\0" in location or posix.is_absolute() or windows.anchor or ".." in parts:
        raise PathEscape(
            f"{model}: external data found at {location[:200]!r}, required a file in the model's own folder"
        )
    file = model.parent / location
    within = [parent for parent in (file, *file.parents) if parent != model.parent and model.parent in parent.parents]
    if any(map(os.path.islink, within)):
        raise PathEscape(f"{model}: external data found at {location!r}, which is a link, required a plain file")
    if not file.is_file():
        raise Incomplete(f"{model.parent}: the file {location} is missing, which {model.name} refers to")
    found = file.stat().st_size
    required = _number(model, entries, "offset") + _number(model, entries, "length")
    if found < required:
        raise Incomplete(f"{file}: found {found} bytes, required {required}")


def _number(model: Path, entries: dict[str, str], key: str) -> int:
    text = entries.get(key, "0")
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise Incompatible(f"{model}: {key} of external data: found {text[:40]!r}, required a whole number")
    return int(text)
