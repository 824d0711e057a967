"""A bundle with the engines of some of its targets only, as it comes from the Hub.

    partial.json    {"targets": ["cpu-x86-64-v3"]}, the targets whose engines are here

Beside it stands the manifest of the whole bundle, to the byte, so that the id (and whatever was said or signed of it)
still holds. What may be missing is narrow: files of the role native, in the directory of an engine, that no target
named here uses. They must be missing indeed: a directory is one thing or the other. Everything else must be there,
so whatever is used is there and hashed; and since the note only takes away, whoever writes one gains nothing.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping

from diffkiln.bundle import strict_json
from diffkiln.bundle.layout import PARTIAL
from diffkiln.bundle.manifest import Manifest
from diffkiln.errors import ManifestInvalid

MAX_PARTIAL_BYTES = 1 << 20


def engine_targets(manifest: Manifest) -> tuple[str, ...]:
    """Returns the targets that the bundle has engines for, each once."""
    return tuple(dict.fromkeys(row.target for row in manifest.engines))


def left_out(manifest: Manifest, targets: Collection[str]) -> frozenset[str]:
    """Returns the files that a bundle for only these targets does not need."""
    users: dict[str, set[str]] = {}
    for row in manifest.engines:
        users.setdefault(row.path, set()).add(row.target)
    native = (row.path for row in manifest.files if row.role == "native")
    return frozenset(path for path in native if (found := _users(path, users)) and found.isdisjoint(targets))


def dump_partial(targets: Collection[str]) -> bytes:
    """Returns the content of `partial.json`."""
    return (json.dumps({"targets": sorted(targets)}) + "\n").encode()


def parse_partial(data: bytes, manifest: Manifest) -> tuple[str, ...]:
    """Returns the targets that a `partial.json` names, which may be hostile. Raises `ManifestInvalid`."""
    try:
        raw = strict_json.loads(data, max_bytes=MAX_PARTIAL_BYTES)
    except strict_json.StrictJSONError as error:
        raise ManifestInvalid(f"{PARTIAL}: {error}") from error
    named = raw.get("targets") if isinstance(raw, dict) else None
    known = engine_targets(manifest)
    here = {name for name in named if isinstance(name, str)} if isinstance(named, list) else set()
    if not isinstance(named, list) or len(here) != len(named) or not here.issubset(known):
        raise ManifestInvalid(
            f"{PARTIAL} should list targets that the manifest has engines for ({', '.join(known[:10]) or 'none'}). "
            "Fetch the bundle again"
        )
    return tuple(name for name in known if name in here)


def _users(path: str, users: Mapping[str, set[str]]) -> set[str]:
    """Returns the targets of the engines whose directories contain the file."""
    found: set[str] = set()
    for directory in _above(path):
        found |= users.get(directory, set())
    return found


def _above(path: str) -> Iterator[str]:
    while path := path.rpartition("/")[0]:
        yield path
