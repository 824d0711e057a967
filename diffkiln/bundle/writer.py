"""Writing a bundle: everything into a staging directory, and then in one step to its name."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from pydantic import ValidationError

from diffkiln.bundle.digest import sha256_bytes, sha256_file
from diffkiln.bundle.hashed import Stamp, stamp_of
from diffkiln.bundle.layout import MANIFEST, MANIFEST_DIGEST, UNHASHED
from diffkiln.bundle.manifest import (
    RESERVED,
    FileEntry,
    Manifest,
    Role,
    bundle_id,
    check_role,
    dump_manifest,
    parse_manifest,
    problems,
)
from diffkiln.bundle.output import check_replaceable, checked_output, lock_output
from diffkiln.bundle.paths import check_path
from diffkiln.bundle.reader import digest_line
from diffkiln.bundle.staging import (
    Staging,
    explain,
    explained,
    free_bytes,
    is_full,
    remove_stale,
    sync_tree,
    walk,
)
from diffkiln.bundle.verified import Verified
from diffkiln.errors import BuildError, DiffkilnError, DigestMismatch, MissingDependency


class BundleWriter:
    """A context manager that writes one bundle to `output`, a path that does not exist yet.

    With `force`, an existing bundle is replaced at the moment of `publish`. Leaving the context without `publish`, by
    an exception or not, leaves the output as it was.

    Entering raises `SpecError` for an output that cannot be meant, `OutputBusy` if another process is writing it, and
    `BuildError` if the directory above cannot be written to.
    """

    def __init__(self, output: str | os.PathLike[str], force: bool = False) -> None:
        self._stated = output
        self._force = force
        self._rows: dict[str, tuple[FileEntry, Stamp]] = {}  # with what it was when it was hashed
        self._unhashed: set[str] = set()
        self._shared: set[str] = set()  # with the bundle that is to be replaced

    def __enter__(self) -> Self:
        self.output = checked_output(self._stated)
        self._lock = lock_output(self.output)
        try:
            with explained(self.output.parent, "look into"):
                remove_stale(self.output)
            check_replaceable(self.output, self._force)
            self._staging = Staging(self.output)
            self._staging.create()
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        explanation = self._explanation(error)  # before the staging, which it measures, is gone
        try:
            self._staging.remove()
        finally:
            self._lock.release()
        if explanation is not None:
            raise explanation from error

    @property
    def rows(self) -> tuple[FileEntry, ...]:
        """Returns the rows of the files written so far, sorted by path."""
        return tuple(self._rows[path][0] for path in sorted(self._rows))

    def path(self, rel: str) -> Path:
        """Returns the path at which the caller writes the file `rel`, and makes its directories. `add` must follow."""
        target = self._target(rel)
        with explained(target.parent, "make the directory"):
            target.parent.mkdir(parents=True, exist_ok=True)
        return target

    def write(self, rel: str, data: bytes, role: Role) -> FileEntry:
        """Writes a small file.

        Raises `PathEscape` or `ManifestInvalid` for its name, and `BuildError` if it exists.
        """
        self._target(rel, role)
        target = self.path(rel)
        _write(target, data)
        return self._register(rel, target, sha256_bytes(data), role)

    def add(self, rel: str, role: Role) -> FileEntry:
        """Registers a file that was written at `path(rel)`. The file must not change any more."""
        target = self._target(rel, role)
        with explained(target, "read"):
            _check_plain(target)
            return self._register(rel, target, sha256_file(target), role)

    def keep(self, row: FileEntry, source: Verified) -> None:
        """Takes over a file of another bundle unchanged, with its row.

        Weights of the bundle that this one replaces stay the same file, under a second name until the old bundle goes.
        Raises `DigestMismatch` if the file differs from its row, and `BuildError` if it exists.
        """
        target = self.path(row.path)
        with explained(target, "write", row.size):
            if source.hand_over(row.path, target, share=source.path == self.output):
                self._shared.add(row.path)
        if self._register(row.path, target, row.sha256, row.role) != row:
            raise DigestMismatch(
                f"{row.path!r} is not the file that the manifest names. Fetch or build the bundle again"
            )

    def write_unhashed(self, rel: str, data: bytes) -> None:
        """Writes `build.json` or `README.md`, which are outside the id and the digests."""
        if rel not in UNHASHED:
            raise BuildError(f"{rel!r} belongs into the manifest; only {sorted(UNHASHED)} are outside it")
        _write(self._staging.root / rel, data)
        self._unhashed.add(rel)

    def require_space(self, size: int) -> None:
        """Raises `BuildError` now if `size` more bytes (of files to be written) will not fit."""
        free = free_bytes(self.output.parent)
        if free < size:
            raise BuildError(
                f"{self.output} does not fit: {size} bytes are needed and {free} are free in "
                f"{self.output.parent}. Make room or write elsewhere"
            )

    def publish(
        self,
        build: Callable[[tuple[FileEntry, ...]], Manifest],
        report: Callable[[Manifest], None] | None = None,
        trial: Callable[[Path], None] | None = None,
    ) -> str:
        """Writes the manifest that `build` makes of `rows`, syncs all files, and takes the output's place.

        `trial` is called with the directory, complete but for what is outside the digests, and may still refuse.
        `report` is called with the validated manifest after that, and may still `write_unhashed`.

        Returns the bundle's id. Raises `BuildError`, with the output as it was before.
        """
        self._check_staged()
        data, manifest = self._manifest(build)
        root = self._staging.root
        _write(root / MANIFEST, data)
        _write(root / MANIFEST_DIGEST, digest_line(data))
        if trial is not None:
            trial(root)
        if report is not None:
            report(manifest)
        with explained(root, "sync"):
            sync_tree(root)
        check_replaceable(self.output, self._force)
        self._staging.install()
        return bundle_id(data)

    def _manifest(self, build: Callable[[tuple[FileEntry, ...]], Manifest]) -> tuple[bytes, Manifest]:
        rows = self.rows
        try:
            manifest = build(rows)
            data = dump_manifest(manifest)
            parse_manifest(data)  # what cannot be read back is not published
        except ValidationError as error:
            raise BuildError(problems=problems(error)) from error
        except MissingDependency:
            raise
        except DiffkilnError as error:
            raise BuildError(f"the bundle's manifest is not valid: {error}") from error
        if manifest.files != rows:
            raise BuildError("the bundle's manifest does not list the files that were written")
        return data, manifest

    def _check_staged(self) -> None:
        """Checks that the staging holds exactly the registered files, unchanged. Removes empty directories."""
        root = self._staging.root
        found: set[str] = set()
        with explained(root, "read"):
            for directory, files in walk(root):
                if not os.listdir(directory) and directory != root:
                    directory.rmdir()
                found |= {file.relative_to(root).as_posix() for file in files}
            if strange := sorted(found - self._rows.keys() - self._unhashed):
                raise BuildError(f"{strange[0]!r} was written but never added to the bundle")
            for path, (row, stamp) in self._rows.items():
                now = stamp_of(_check_plain(root / path, names=2 if path in self._shared else 1))
                # ctime alone may also mean another link or mode, so the bytes decide.
                if now != stamp and (now[:2] != stamp[:2] or sha256_file(root / path) != row.sha256):
                    raise BuildError(f"{path!r} changed after it was added to the bundle")

    def _register(self, rel: str, target: Path, digest: str, role: Role) -> FileEntry:
        if rel in self._rows:
            raise BuildError(f"{rel!r} was added to the bundle twice")
        status = os.stat(target, follow_symlinks=False)
        row = FileEntry(path=rel, size=status.st_size, sha256=digest, role=role)
        self._rows[rel] = row, stamp_of(status)
        return row

    def _target(self, rel: str, role: Role | None = None) -> Path:
        path = check_path(rel)
        if rel in RESERVED:
            raise BuildError(f"{rel!r} is not among a bundle's hashed files")
        if role is not None:
            check_role(rel, role)
        return self._staging.root / path

    def _explanation(self, error: BaseException | None) -> BuildError | None:
        """Returns a `BuildError` for a failed write of the caller's own to the staging; `None` for other errors."""
        if not isinstance(error, OSError):
            return None
        root = self._staging.root
        named = any(str(root) in os.fsdecode(name) for name in (error.filename, error.filename2) if name)
        # A `write` that finds the disk full names no file.
        if not named and not (is_full(error) and error.filename is None):
            return None
        written = sum(file.lstat().st_size for _, files in walk(root) for file in files)
        return explain(error, root, "write to", f"more than the {written} bytes written so far are needed")


def _write(target: Path, data: bytes) -> None:
    with explained(target, "write", len(data)):
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        with open(os.open(target, flags, 0o666), "wb") as file:
            file.write(data)


def _check_plain(path: Path, names: int = 1) -> os.stat_result:
    status = os.lstat(path)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink != names:
        raise BuildError(f"{path} is not a plain file (a link?). Write a copy")
    return status
