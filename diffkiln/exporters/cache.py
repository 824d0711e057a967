"""Engines that were built before, by everything that decides their bytes.

    <root>/engines/<key>/index.json   what the engine is, with a digest of each file and one of itself
    <root>/engines/<key>/files/…      the engine
    <root>/toolchain/…                what builds share (diffkiln.exporters.toolchain)

An entry appears whole, by a rename, or not at all. One that does not match its digests is as good as absent. Builds run
what they find here, so both directories are this user's alone, or are refused (diffkiln.bundle.private).
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import weakref
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from diffkiln.bundle.digest import sha256_bytes, sha256_file
from diffkiln.bundle.manifest import TensorSpec
from diffkiln.bundle.scratch import Scratch
from diffkiln.bundle.state import cache_home, cache_root
from diffkiln.errors import BuildError, ExportError
from diffkiln.exporters.artefact import Artefact, Lowering
from diffkiln.program import fingerprint

_INDEX, _FILES = "index.json", "files"


def engine_key(backend: str, version: int, lowering: Lowering, tools: Mapping[str, str]) -> str:
    """Returns the name of an engine in the cache; `tools` are the programs that build it, with their versions."""
    target = lowering.target
    decisive = {
        "backend": [backend, version],
        "region": fingerprint(lowering.region),
        "family": [fingerprint(member) for member in lowering.family.members] if lowering.family else [],
        "target": [target.device, target.isa, target.sm],
        "options": dict(lowering.options),
        "tools": dict(tools),
    }
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


class EngineCache:
    """Engines under one directory, which several processes and threads may share.

    Args:
        root: made when it is not there; `cache_root()` where none is given.
    """

    def __init__(self, root: Path | None = None) -> None:
        self.root = root if root is not None else cache_root()
        self._held = False

    @property
    def toolchain(self) -> Path:
        """Returns the folder of files that builds share. Raises `IntegrityError` as `get`, `ExportError` as `put`."""
        return self._made("toolchain")

    def get(self, key: str) -> Artefact | None:
        """Returns the engine of this key, unless it is missing or damaged.

        Raises:
            IntegrityError: the cache belongs to another user, or others may write to it.
        """
        engines = cache_home(self.root).existing("engines")
        if engines is None:
            return None
        self._hold()
        return self._read(engines / key)

    def _hold(self) -> None:
        """Keeps `diffkiln clean` away from the directory as long as this object lives."""
        if not self._held:
            self._held = True
            descriptor = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY)
            weakref.finalize(self, os.close, descriptor)
            with suppress(OSError):  # a file system without locks
                fcntl.flock(descriptor, fcntl.LOCK_SH)

    def _read(self, entry: Path) -> Artefact | None:
        try:
            index = json.loads((entry / _INDEX).read_bytes())
            body = index["body"]
            if sha256_bytes(_canonical(body)) != index["sha256"] or _digests(entry / _FILES) != body["files"]:
                return None
            return _artefact(body, entry / _FILES)
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def put(self, key: str, artefact: Artefact) -> Artefact:
        """Copies an engine in and returns it as it lies in the cache. Another process's good entry is kept.

        Raises:
            ExportError: the cache's directory cannot be written.
            IntegrityError: as `get`.
        """
        entry = self._made("engines") / key
        try:
            staging = Scratch("new", entry.parent)
            try:
                self._fill(staging.path, artefact)
                self._publish(staging.path, entry)
            finally:
                staging.remove()
        except OSError as error:
            raise ExportError(
                f"the engine cache {self.root} cannot be written: {error}. Set DIFFKILN_CACHE_DIR to a directory "
                "that can"
            ) from error
        return replace(artefact, directory=entry / _FILES)

    def _made(self, name: str) -> Path:
        try:
            made = cache_home(self.root).directory(name)
        except BuildError as error:
            raise ExportError(str(error)) from error
        self._hold()
        return made

    def _fill(self, staging: Path, artefact: Artefact) -> None:
        shutil.copytree(artefact.directory, staging / _FILES)
        body = _body(artefact) | {"files": _digests(staging / _FILES)}
        index = {"body": body, "sha256": sha256_bytes(_canonical(body))}
        (staging / _INDEX).write_text(json.dumps(index, indent=1, sort_keys=True))

    def _publish(self, staging: Path, entry: Path) -> None:
        """Renames the new entry into place, after removing a damaged one."""
        for _ in range(10):
            try:
                os.rename(staging, entry)
                return
            except OSError:
                if not entry.exists():
                    raise
            if self._read(entry) is not None:
                return
            damaged = Scratch("old", entry.parent)
            try:
                os.rename(entry, damaged.path)
            except FileNotFoundError:
                pass  # another process was as quick
            finally:
                damaged.remove()
        raise OSError(f"{entry} keeps changing")


def _digests(directory: Path) -> dict[str, str]:
    files = sorted(path for path in directory.rglob("*") if not path.is_dir())
    return {path.relative_to(directory).as_posix(): sha256_file(path) for path in files}


def _canonical(body: Any) -> bytes:
    return json.dumps(body, sort_keys=True).encode()


def _body(artefact: Artefact) -> dict[str, Any]:
    body = asdict(replace(artefact, directory=Path(), inputs=(), outputs=()))
    del body["directory"]
    layouts = {"inputs": artefact.inputs, "outputs": artefact.outputs}
    body |= {name: [spec.model_dump(mode="json") for spec in specs] for name, specs in layouts.items()}
    return json.loads(json.dumps(body))


def _artefact(body: Mapping[str, Any], directory: Path) -> Artefact:
    def specs(name: str) -> tuple[TensorSpec, ...]:
        return tuple(TensorSpec.model_validate_json(json.dumps(spec)) for spec in body[name])

    return Artefact(
        body["backend"], directory, specs("inputs"), specs("outputs"), dict(body["options"]), dict(body["requires"]),
        # Entries of earlier versions do not have these.
        autotuned=body.get("autotuned"), packages=dict(body.get("packages", {})), exact=body.get("exact", False),
    )  # fmt: skip
