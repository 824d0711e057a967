"""A bundle that has been checked, and the only way to its bytes.

What is handed out is what was hashed. Small files are hashed again as they are read. Weights are hashed in the buffer
that they are read into, or read through descriptors that have been held open since they were hashed, so that putting
another file in their place changes nothing. Native code is copied into a private directory and hashed on the way.
Nothing of the bundle is mapped into memory: a file that is cut short while in use gives an error, not SIGBUS. Weights
that processes share are mapped from private copies (diffkiln.bundle.mapped).
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import weakref
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Self

from diffkiln.bundle import safe_open
from diffkiln.bundle.bytes_read import AGAIN, check_digest, check_unwritten, chunks_of, mismatch
from diffkiln.bundle.card import build_in
from diffkiln.bundle.digest import Progress, sha256_bytes
from diffkiln.bundle.hashed import Receipt, Stamp, stamp_of
from diffkiln.bundle.layout import PARTIAL
from diffkiln.bundle.manifest import FileEntry, Manifest
from diffkiln.bundle.mapped import mapped
from diffkiln.bundle.paths import check_path
from diffkiln.bundle.readers import Readers
from diffkiln.bundle.scratch import Scratch, folder_to_run
from diffkiln.bundle.sharing import clone, link
from diffkiln.bundle.signature import Signature
from diffkiln.errors import CallError, DiffkilnError, DigestMismatch, Incomplete, IntegrityError

#: How often weights are read anew that something happened to meanwhile.
_LOOKS = 5

#: Read and hashed at once. Between pieces a thread waits for Python's lock, which a busy interpreter holds for 5 ms.
_PIECE = 1 << 24


class _Held:
    """The descriptors and temporary directories of a bundle, released once."""

    def __init__(self) -> None:
        self.descriptors: list[int] = []
        self.directories: list[Scratch] = []

    def release(self) -> None:
        while self.descriptors:
            os.close(self.descriptors.pop())
        while self.directories:
            self.directories.pop().remove()


class Verified:
    """A bundle whose files have been checked, made by `Bundle.verify`. Closing it releases descriptors and copies.

    It is a context manager. `manifest` describes the whole bundle; `files` and `targets` are those that are here
    (diffkiln.bundle.partial).
    """

    def __init__(
        self,
        path: Path,
        root: int,
        manifest: Manifest,
        identity: str,
        files: tuple[FileEntry, ...],
        targets: tuple[str, ...],
        signature: Signature | None = None,
    ) -> None:
        self.path = path
        self.manifest = manifest
        self.id = identity
        self.signature = signature  # of this manifest; by whom, `trust` finds out
        self.files = files
        self.targets = targets
        self._root = root
        self._rows = {row.path: row for row in files}
        self._weights: dict[str, tuple[int, Stamp]] = {}  # path to descriptor, and what it was when it was opened
        self._hashed: set[str] = set()
        self._receipt: Receipt | None = None
        self._copies: dict[str, Path] = {}
        self._held = _Held()
        self._held.descriptors.append(root)
        self._finalizer = weakref.finalize(self, self._held.release)

    @property
    def build(self) -> Mapping[str, Any]:
        """Returns the content of `build.json`, which is outside the digests; empty if it cannot be read."""
        return build_in(self._root)

    def read(self, path: str) -> bytes:
        """Returns the bytes of a config, program, doc or (small) weights file, hashed again here.

        Raises `Incomplete` for a path that the manifest does not name, and `DigestMismatch` for other bytes.
        """
        row = self._row(path)
        if row.role == "native":
            raise IntegrityError(f"{path!r} is native code: it is handed out by native_copy alone")
        descriptor = self._weights[path][0] if path in self._weights else self._open(path)
        try:
            with safe_open.explained(path):
                data = safe_open.read_up_to(descriptor, row.size + 1)
        finally:
            if path not in self._weights:
                os.close(descriptor)
        if len(data) != row.size or sha256_bytes(data) != row.sha256:
            raise mismatch(row)
        return data

    def descriptor(self, path: str) -> int:
        """Returns an open descriptor of a weights file, for `os.pread`. It belongs to this object: do not close it.

        The file has been hashed, now if `verify` left weights out. A short read means that the file was cut: use
        `read_into`, which checks.
        """
        descriptor, _ = self._weights_of(path)
        self.check(path)
        return descriptor

    def read_into(
        self, path: str, buffer: memoryview | bytearray, offset: int = 0, progress: Progress | None = None
    ) -> None:
        """Fills `buffer` (writable, contiguous) with weights from byte `offset` on.

        A file that has not been hashed yet and is read to its end is hashed on the way, so the hashed bytes are those
        in the buffer. After an error the buffer must not be used.

        Raises `DigestMismatch` if the file is another one, ends early, or was written to after it was hashed.
        """
        view = memoryview(buffer).cast("B")
        if path not in self._hashed and offset + len(view) == self._row(path).size:
            self._read_and_hash(path, view, offset, progress)
        else:
            self._fill(path, self.descriptor(path), view, offset)

    def peek(self, path: str, size: int, offset: int = 0) -> bytes:
        """Returns bytes of a weights file before it is hashed: for a header, which says where tensors lie.

        The caller has the file hashed before it uses the tensors. Raises as `read_into`.
        """
        data = bytearray(size)
        self._fill(path, self._weights_of(path)[0], memoryview(data), offset)
        return bytes(data)

    def size(self, path: str) -> int:
        """Returns the size in bytes that the manifest states, and that the file has."""
        return self._row(path).size

    def pread(self, path: str, size: int, offset: int = 0) -> bytes:
        """Returns `size` bytes of a weights file from `offset` on; raises as `read_into`."""
        buffer = bytearray(size)
        self.read_into(path, buffer, offset)
        return bytes(buffer)

    def shared(self, path: str, data: int) -> memoryview | None:
        """Returns a weights file in memory that processes of this user share, from a private copy.

        What is written into it is this process's own. None where there can be no such copy: read the file then.

        Args:
            path: Of the file.
            data: Where its tensors begin, which then begin at a page of memory.

        Raises:
            DigestMismatch: the file is not the one that the manifest names.
        """
        row = self._row(path)
        self._weights_of(path)

        def write(target: Path, pad: int) -> None:
            self._copy_file(row, target, pad=pad)

        return mapped(row.sha256, row.size, data, write)

    def native_copy(self, prefix: str) -> Path:
        """Copies every native file under the directory `prefix` into a private (0700) temporary directory and returns
        it.

        The written bytes are hashed. The directory lives until `close`. Raises `DigestMismatch`, and `Incomplete` if
        the manifest names no native file there.
        """
        prefix = str(check_path(prefix))
        self._check_open()
        if prefix not in self._copies:
            rows = [row for row in self._rows.values() if row.role == "native" and row.path.startswith(prefix + "/")]
            if not rows:
                raise Incomplete(f"the bundle has no native file under {prefix!r} that its manifest names")
            self._copies[prefix] = self._copy(prefix, rows)
        return self._copies[prefix]

    def hand_over(self, path: str, target: Path, share: bool) -> bool:
        """Puts a file into a bundle that is being written, as `target`, which must not exist.

        With `share`, weights get a second name (hard link) if the file system can; otherwise they are copied, without
        moving bytes where the file system shares blocks. Weights that `verify` left out are hashed by their next
        reader, not here. Any other file is copied and hashed on the way.

        Returns:
            True if both names are the same file.

        Raises:
            DigestMismatch: the file is not, or is no longer, the one that the manifest names.
            OSError: `target` cannot be written.
        """
        row = self._row(path)
        if row.role != "weights":
            self._copy_file(row, target, 0o666)
            return False
        descriptor, stamp = self._weights[path]
        shared = share and link(self.path / path, target, os.fstat(descriptor))
        if not shared:
            clone(descriptor, target)
        # Not by ctime, which linking changes. It also shows that the copy is not of a file that was cut.
        check_unwritten(path, stamp, stamp_of(os.fstat(descriptor)))
        return shared

    def check(self, path: str, progress: Progress | None = None) -> None:
        """Hashes one file unless that has been done. Raises `DigestMismatch`."""
        row = self._row(path)
        if path in self._hashed:
            return
        if path in self._weights:
            check_digest(row, self._weights[path][0], progress)
            self._is_untouched(path)
        else:
            descriptor = self._open(path)
            try:
                check_digest(row, descriptor, progress)
            finally:
                os.close(descriptor)
        self._hashed.add(path)

    def is_hashed(self, path: str) -> bool:
        return path in self._hashed

    def hash_all(self, paths: Iterable[str], readers: Readers) -> None:
        """Hashes several files at a time, unless that has been done. Raises `DigestMismatch`."""
        readers.run([partial(self.check, path) for path in paths])

    def hash_rest(self, readers: Readers) -> None:
        """Hashes the remaining weights, and notes all hashed files for the next load. Raises `DigestMismatch`."""
        self.hash_all(self._weights.keys() - self._hashed, readers)
        if self._receipt is not None:
            self._receipt.note(self.stamps())

    def keep(self, receipt: Receipt) -> None:
        """Notes hashed files for the next load, now and later. Called by `Bundle.verify`."""
        self._receipt = receipt
        receipt.note(self.stamps())

    def hold_weights(self) -> None:
        """Opens every weights file and keeps it open. Called once, by `Bundle.verify`."""
        for row in self._rows.values():
            if row.role == "weights":
                descriptor = self._open(row.path)
                self._held.descriptors.append(descriptor)
                self._weights[row.path] = descriptor, stamp_of(os.fstat(descriptor))

    def accept(self, stamps: Mapping[str, Stamp]) -> None:
        """Accepts weights as hashed if their stamps are unchanged. Called by `Bundle.verify`."""
        self._hashed |= {path for path, (_, stamp) in self._weights.items() if stamps.get(path) == stamp}

    def stamps(self) -> dict[str, Stamp]:
        """Returns the stamps of the weights that have been hashed and have not changed since they were opened."""
        return {
            path: stamp
            for path, (descriptor, stamp) in self._weights.items()
            if path in self._hashed and stamp_of(os.fstat(descriptor)) == stamp
        }

    def close(self) -> None:
        """Closes the descriptors and removes the temporary copies. May be called twice."""
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _copy(self, prefix: str, rows: list[FileEntry]) -> Path:
        needed = sum(row.size for row in rows)
        try:
            made = Scratch("native", folder_to_run())
            self._held.directories.append(made)
            for row in rows:
                self._copy_file(row, made.path / row.path[len(prefix) + 1 :])
        except OSError as error:
            raise DiffkilnError(
                f"cannot copy the native code of {prefix!r} ({needed} bytes) to {tempfile.gettempdir()}: "
                f"{error.strerror or error}. Set TMPDIR to a directory with room"
            ) from error
        return made.path

    def _copy_file(self, row: FileEntry, target: Path, mode: int = 0o600, pad: int = 0) -> None:
        """Copies a file, behind so many zeros, and hashes it on the way."""
        target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        digest = hashlib.sha256()
        size = 0
        source = self._open(row.path)
        try:
            descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode)
            with open(descriptor, "wb") as file:
                file.write(bytes(pad))
                for chunk in chunks_of(row.path, source):
                    size += len(chunk)
                    if size > row.size:
                        break
                    digest.update(chunk)
                    file.write(chunk)
        finally:
            os.close(source)
        if size != row.size or digest.hexdigest() != row.sha256:
            target.unlink()
            raise mismatch(row)

    def _is_untouched(self, path: str) -> bool:
        """Returns True if weights are as they were. Else they are hashed, and what was read before must be read again.

        A write that sets mtime back changes ctime, and so do a rename, a link and a removal, as when a bundle is
        replaced. Which of them it was, only the bytes say.

        Raises `DigestMismatch` if they were written to.
        """
        descriptor, stamp = self._weights[path]
        now = stamp_of(os.fstat(descriptor))
        if now == stamp:
            return True
        check_unwritten(path, stamp, now)
        check_digest(self._rows[path], descriptor)
        self._weights[path] = descriptor, now  # from before it was hashed, so that a later write is seen
        return False

    def _fill(self, path: str, descriptor: int, view: memoryview, offset: int) -> None:
        for _ in range(_LOOKS):
            for _ in safe_open.filled(path, descriptor, view, offset):
                pass
            if self._is_untouched(path):
                return
        raise DigestMismatch(f"{path!r} keeps changing while in use. {AGAIN}")

    def _read_and_hash(self, path: str, view: memoryview, offset: int, progress: Progress | None) -> None:
        descriptor, _ = self._weights_of(path)
        digest = hashlib.sha256()
        head = memoryview(bytearray(offset))
        for part, start in ((head, 0), (view, offset)):
            for piece in safe_open.filled(path, descriptor, part, start, _PIECE):
                digest.update(piece)
                if progress is not None:
                    progress(len(piece))
        if digest.hexdigest() != self._row(path).sha256:
            raise mismatch(self._row(path))
        self._is_untouched(path)  # what lies in the buffer is right; a change since then is noted
        self._hashed.add(path)

    def _weights_of(self, path: str) -> tuple[int, Stamp]:
        row = self._row(path)
        if row.role != "weights":
            raise IntegrityError(f"{path!r} has the role {row.role}, not weights")
        return self._weights[path]

    def _open(self, path: str) -> int:
        self._check_open()
        shared = self._rows[path].role == "weights"
        return safe_open.open_file(self._root, path, self.path if shared else None)

    def _row(self, path: str) -> FileEntry:
        self._check_open()
        try:
            return self._rows[path]
        except KeyError:
            if any(row.path == path for row in self.manifest.files):
                raise Incomplete(f"{path!r} was left out when the bundle was pulled, as {PARTIAL} says") from None
            raise Incomplete(f"the manifest does not name {path!r}") from None

    def _check_open(self) -> None:
        if not self._finalizer.alive:
            raise CallError(f"the verified bundle {self.path} is closed")
