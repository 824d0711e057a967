"""What a model's card says of its licence. It is copied, not judged: whether a use is allowed is for people to say."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path

CARD = "README.md"
#: As the Hub's model cards call them, and CycloneDX after them.
FIELDS = ("license", "license_name", "license_link")
_HEADER = re.compile(r"\A\ufeff?---\r?\n(.*?)\r?\n---\s*(?:\n|\Z)", re.DOTALL)
_QUOTES = " '\""
_NOT_PLAIN = "[{&*!|>%@`"
_MAX_CARD = 2**20
_MAX_HEADER = 10**8


def licence_of(folder: Path) -> dict[str, str]:
    """Returns `license`, `license_name` and `license_link` from the card in `folder`, as far as it states them."""
    return {name: ", ".join(words) for name, words in stated(folder, FIELDS).items()}


def stated(folder: Path, names: Sequence[str]) -> dict[str, list[str]]:
    """Returns the words of these fields in the header of the card in `folder`.

    The header is YAML. Only plain lines `name: words`, quotes and lists are read: a stranger wrote the card, and a few
    thousand brackets keep a full parser busy for minutes.
    """
    try:
        with (folder / CARD).open("rb") as file:
            text = file.read(_MAX_CARD).decode("utf-8", "replace")
    except OSError:
        return {}
    header = _HEADER.match(text)
    lines = header[1].splitlines() if header else []
    return {name: found for name in names if (found := _values(lines, name))}


def _values(lines: list[str], name: str) -> list[str]:
    """Returns the words after `name:`, or those of the list below it."""
    for index, line in enumerate(lines):
        if not line.startswith(f"{name}:"):
            continue
        given = line.partition(":")[2].strip()
        if given.startswith("[") and given.endswith("]"):
            return _words([item.strip(_QUOTES) for item in given[1:-1].split(",")])
        if not given:
            below = takewhile(lambda row: row.lstrip().startswith("- "), lines[index + 1 :])
            return _words([row.strip()[2:].strip(_QUOTES) for row in below])
        return [] if given[0] in _NOT_PLAIN else _words([given.strip(_QUOTES)])
    return []


def licence_in(file: Path) -> dict[str, str]:
    """Returns the licence in the metadata of a safetensors file (`modelspec.license`), where trainers put it."""
    try:
        with file.open("rb") as opened:
            (size,) = struct.unpack("<Q", opened.read(8))
            metadata = json.loads(opened.read(min(size, _MAX_HEADER)))["__metadata__"]
            found = _words([metadata.get("modelspec.license")])
    except (OSError, ValueError, LookupError, TypeError, AttributeError, struct.error, RecursionError):
        return {}
    return {"license": found[0]} if found else {}


def _words(items: Sequence[object]) -> list[str]:
    """Returns each item as one line of text."""
    return [" ".join(item.split())[:1000] for item in items if isinstance(item, str) and item.strip()]
