"""Reading a bundle: what its manifest says, and whether the directory is that and nothing else."""

from __future__ import annotations

import os
import stat
import time
import weakref
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal, Self

from diffkiln.bundle import hashed, safe_open
from diffkiln.bundle.card import build_in
from diffkiln.bundle.digest import Progress
from diffkiln.bundle.layout import MANIFEST, MANIFEST_DIGEST, PARTIAL, SIGNATURE
from diffkiln.bundle.manifest import MAX_MANIFEST_BYTES, RESERVED, FileEntry, Manifest, Role, bundle_id, parse_manifest
from diffkiln.bundle.partial import MAX_PARTIAL_BYTES, engine_targets, left_out, parse_partial
from diffkiln.bundle.readers import Readers
from diffkiln.bundle.signature import MAX_SIGNATURE_BYTES, Signature, parse_signature
from diffkiln.bundle.verified import Verified
from diffkiln.errors import (
    CallError,
    DigestMismatch,
    Incomplete,
    IntegrityError,
    ManifestInvalid,
    PathEscape,
    UnexpectedFile,
)
from diffkiln.guards.gate import gated


class Bundle:
    """A bundle whose manifest has been read and agrees with its digest. No other file has been looked at.

    The directory is held open: what is verified later is this directory, whatever becomes of its name. `targets` are
    those whose engines are here, and `files` what is here: all that the manifest names, unless the bundle is partial.
    """

    def __init__(
        self,
        path: Path,
        root: int,
        manifest: Manifest,
        identity: str,
        targets: tuple[str, ...],
        signature: Signature | None = None,
    ) -> None:
        self.path = path
        self.manifest = manifest
        self.id = identity
        self.targets = targets
        self.signature = signature  # of this manifest; by whom has yet to be checked
        absent = left_out(manifest, targets)
        self.files = tuple(row for row in manifest.files if row.path not in absent)
        self._root = root
        self._finalizer = weakref.finalize(self, os.close, root)

    @gated("progress")
    def verify(
        self,
        progress: Progress | None = None,
        roles: Collection[Role] | None = None,
        receipt: Literal["ignore", "renew", "use"] = "ignore",
    ) -> Verified:
        """Checks the whole directory against the manifest and hashes its files.

        `progress` is called with the bytes hashed since its last call, from one thread at a time. With `roles`, only
        files of these roles are hashed now; every other file is hashed before its bytes are handed out. The structure
        is always checked whole. `receipt` "use" accepts weights that an earlier load hashed and that look untouched;
        "renew" hashes them again. Both note for the next load which files were hashed; `Verified.hash_rest` notes later
        ones.

        Raises `Incomplete`, `DigestMismatch`, `PathEscape` or `UnexpectedFile`.
        """
        if not self._finalizer.alive:
            raise CallError(f"the bundle {self.path} is closed")
        rows = {row.path: row for row in self.files}
        _check_tree(self.path, self._root, rows)
        started = time.time_ns()
        known = hashed.recall(self.id, self.path) if receipt == "use" else {}
        verified = Verified(
            self.path, os.dup(self._root), self.manifest, self.id, self.files, self.targets, self.signature
        )
        try:
            verified.hold_weights()
            verified.accept(known)
            wanted = [path for path, row in rows.items() if roles is None or row.role in roles]
            verified.hash_all(wanted, Readers(progress))
            if receipt != "ignore":
                verified.keep(hashed.Receipt(self.id, self.path, known, started))
        except BaseException:
            verified.close()
            raise
        return verified

    @property
    def whole(self) -> bool:
        """Returns True if the bundle claims every file that its manifest names; the files are not looked at."""
        return len(self.files) == len(self.manifest.files)

    @property
    def build(self) -> Mapping[str, Any]:
        """Returns the content of `build.json`; empty if it cannot be read, since no call depends on it."""
        return build_in(self._root)

    def close(self) -> None:
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


@gated()
def open_bundle(
    path: str | os.PathLike[str], *, expect_id: str | None = None, ignore_signature: bool = False
) -> Bundle:
    """Opens the bundle at `path` and reads its manifest.

    `path` itself must be a real directory; symbolic links above it are resolved once, here. With `expect_id` (a pin)
    the bundle must have that id. `ignore_signature` is for callers that are about to replace the signature.

    Raises `IntegrityError` if there is no bundle, `Incomplete` if part of the manifest is missing, `DigestMismatch` if
    manifest, digest and pin disagree, `SignatureInvalid` for the signature of another manifest, and whatever
    `parse_manifest` raises.
    """
    resolved = _real_directory(path)
    root = safe_open.open_root(resolved)
    try:
        data = _read_manifest(resolved, root)
        identity = bundle_id(data)
        if expect_id is not None and identity != expect_id:
            raise DigestMismatch(f"{resolved}: the bundle id is {identity}, expected {expect_id}")
        signature = None if ignore_signature else _read_signature(root, data)
        manifest = parse_manifest(data)
        return Bundle(resolved, root, manifest, identity, _targets_here(root, manifest), signature)
    except BaseException:
        os.close(root)
        raise


def _real_directory(path: str | os.PathLike[str]) -> Path:
    hint = "Give the directory that `diffkiln compile -o` wrote"
    try:
        resolved = safe_open.resolve_parent(path)
        mode = os.lstat(resolved).st_mode
    except (OSError, ValueError, RuntimeError) as error:  # not there, NUL in the name, a loop of links
        reason = "there is no such directory" if isinstance(error, FileNotFoundError) else error
        raise IntegrityError(f"{str(path)!r} is not a diffkiln bundle: {reason}. {hint}") from error
    if stat.S_ISLNK(mode):
        raise PathEscape(f"{resolved} is a symbolic link; give the directory that it points to")
    if not stat.S_ISDIR(mode):
        raise IntegrityError(f"{resolved} is not a diffkiln bundle: it is {safe_open.kind(mode)}. {hint}")
    return resolved


def _read_manifest(path: Path, root: int) -> bytes:
    with safe_open.explained(str(path)):
        names = {MANIFEST, MANIFEST_DIGEST}.intersection(os.listdir(root))
    if not names:
        raise IntegrityError(
            f"{path} is not a diffkiln bundle: it has no {MANIFEST}. "
            "Give the directory that `diffkiln compile -o` wrote"
        )
    if missing := {MANIFEST, MANIFEST_DIGEST} - names:
        raise Incomplete(f"{path}: {missing.pop()} is missing. Fetch or build the bundle again")
    try:
        data = safe_open.read_small(root, MANIFEST, MAX_MANIFEST_BYTES)
    except (Incomplete, PathEscape):
        raise
    except IntegrityError as error:
        raise ManifestInvalid(str(error)) from error
    stated = safe_open.read_small(root, MANIFEST_DIGEST, 1024)
    if stated != digest_line(data):
        raise DigestMismatch(
            f"{path}: {MANIFEST} is not the one that {MANIFEST_DIGEST} names. Fetch or build the bundle again"
        )
    return data


def _targets_here(root: int, manifest: Manifest) -> tuple[str, ...]:
    try:
        data = safe_open.read_small(root, PARTIAL, MAX_PARTIAL_BYTES)
    except Incomplete:
        return engine_targets(manifest)
    return parse_partial(data, manifest)


def _read_signature(root: int, manifest: bytes) -> Signature | None:
    with safe_open.explained("."):
        if SIGNATURE not in os.listdir(root):
            return None
    return parse_signature(safe_open.read_small(root, SIGNATURE, MAX_SIGNATURE_BYTES), manifest)


def digest_line(manifest: bytes) -> bytes:
    """Returns the content of `manifest.sha256`: a line that `sha256sum -c` understands."""
    return f"{bundle_id(manifest)}  {MANIFEST}\n".encode()


def _check_tree(bundle: Path, root: int, rows: Mapping[str, FileEntry]) -> None:
    """Checks that every named file is there, whole and plain, and that nothing else is."""
    directories = {""}
    for path in rows:
        while (path := path.rpartition("/")[0]) not in directories:
            directories.add(path)
    seen: set[str] = set()
    pending = [""]
    while pending:
        directory = pending.pop()
        for path, status in _entries(root, directory):
            if stat.S_ISLNK(status.st_mode):
                raise PathEscape(f"{path!r} is a symbolic link; a bundle holds none")
            if path in directories and stat.S_ISDIR(status.st_mode):
                pending.append(path)
            elif path in rows or path in RESERVED:
                shared = path in rows and rows[path].role == "weights"
                safe_open.check_plain(path, status, bundle if shared else None)
                seen.add(path)
                _check_size(rows.get(path), status.st_size)
            elif path in directories:
                raise PathEscape(f"{path!r} is {safe_open.kind(status.st_mode)}, not a directory")
            else:
                raise UnexpectedFile(
                    f"{path!r} is {safe_open.kind(status.st_mode)} that the manifest does not name. "
                    "Remove it, or fetch the bundle again"
                )
    if missing := sorted(rows.keys() - seen):
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise Incomplete(
            f"missing: {', '.join(repr(path) for path in missing[:5])}{more}. Fetch or build the bundle again"
        )


def _entries(root: int, directory: str) -> list[tuple[str, os.stat_result]]:
    descriptor = safe_open.open_directory(root, directory)
    prefix = f"{directory}/" if directory else ""
    try:
        with safe_open.explained(directory or "."), os.scandir(descriptor) as entries:
            return [(prefix + entry.name, entry.stat(follow_symlinks=False)) for entry in entries]
    finally:
        os.close(descriptor)


def _check_size(row: FileEntry | None, size: int) -> None:
    if row is not None and size != row.size:
        raise DigestMismatch(
            f"{row.path!r} has {size} bytes, the manifest says {row.size}. Fetch or build the bundle again"
        )
