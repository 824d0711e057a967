"""Opening what lies in a directory that a stranger may have filled: nothing is followed, nothing blocks.

Every step is one component, opened relative to the descriptor of the directory before it. `PathEscape` is
raised for whatever is not a plain file or a real directory, `Incomplete` for what is not there, and
`IntegrityError` for what the system refuses to hand out.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from diffkiln.bundle.sharing import only_staged
from diffkiln.errors import DigestMismatch, Incomplete, IntegrityError, PathEscape

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY


def resolve_parent(path: str | os.PathLike[str]) -> Path:
    """Returns `path` with the directories above it resolved; the last component is left as it is."""
    absolute = Path(path).absolute()  # asks for the working directory, which may be gone, only where it must
    if absolute.name in {"", ".."}:
        return absolute.resolve()
    return absolute.parent.resolve() / absolute.name


def open_root(path: Path) -> int:
    """Opens the bundle's own directory. `path` comes from `resolve_parent`."""
    with explained(str(path)):
        return os.open(path, _DIRECTORY)


def open_directory(root: int, path: str) -> int:
    """Opens a directory below `root`. The empty path opens `root` itself as a new descriptor."""
    descriptor = os.open(".", _DIRECTORY, dir_fd=root)
    try:
        for component in PurePosixPath(path).parts:
            with explained(path):
                inner = os.open(component, _DIRECTORY, dir_fd=descriptor)
            os.close(descriptor)
            descriptor = inner
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def open_file(root: int, path: str, bundle: Path | None = None) -> int:
    """Opens a plain file below `root` for reading: a regular file without another name (hard link).

    With `bundle`, the bundle's directory, names in the staging of its own writer do not count.
    """
    head, _, name = path.rpartition("/")
    directory = open_directory(root, head)
    try:
        with explained(path):
            # Looked at before it is opened, since opening a device can already do something.
            check_plain(path, os.stat(name, dir_fd=directory, follow_symlinks=False), bundle)
            descriptor = os.open(name, _FILE, dir_fd=directory)
    finally:
        os.close(directory)
    try:
        check_plain(path, os.fstat(descriptor), bundle)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def check_plain(path: str, status: os.stat_result, bundle: Path | None = None) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise PathEscape(f"{path!r} is {kind(status.st_mode)}, not a plain file")
    if status.st_nlink != 1 and not (bundle and only_staged(bundle, path, status)):
        raise PathEscape(f"{path!r} has {status.st_nlink} names (hard links); copy the bundle without them")


def read_small(root: int, path: str, limit: int) -> bytes:
    """Returns the content of a plain file of at most `limit` bytes."""
    descriptor = open_file(root, path)
    try:
        with explained(path):
            size = os.fstat(descriptor).st_size
            if size > limit:
                raise IntegrityError(f"{path!r} has {size} bytes, more than the {limit} that are accepted")
            return read_up_to(descriptor, limit)
    finally:
        os.close(descriptor)


def read_up_to(descriptor: int, limit: int) -> bytes:
    """Returns the first `limit` bytes, or fewer if the file ends earlier."""
    parts: list[bytes] = []
    offset = 0
    while offset < limit and (part := os.pread(descriptor, min(limit - offset, 1 << 24), offset)):
        parts.append(part)
        offset += len(part)
    return b"".join(parts)


def filled(path: str, descriptor: int, view: memoryview, offset: int, piece: int | None = None) -> Iterator[memoryview]:
    """Fills `view` with the file's bytes from `offset` on, and yields each part of at most `piece` bytes when it is
    read.

    Raises `DigestMismatch` if the file ends early.
    """
    done = 0
    while done < len(view):
        with explained(path):
            count = os.preadv(descriptor, [view[done : done + piece if piece else None]], offset + done)
        if count == 0:
            raise DigestMismatch(f"{path!r} was cut short while in use. Fetch or build the bundle again")
        yield view[done : done + count]
        done += count


def kind(mode: int) -> str:
    """Returns what kind of file this is, in words."""
    kinds = {
        stat.S_IFREG: "a file",
        stat.S_IFDIR: "a directory",
        stat.S_IFLNK: "a symbolic link",
        stat.S_IFIFO: "a FIFO",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
    }
    return kinds.get(stat.S_IFMT(mode), "of an unknown kind")


@contextmanager
def explained(path: str) -> Iterator[None]:
    """Turns the system's errors about `path` into diffkiln's own."""
    try:
        yield
    except FileNotFoundError as error:
        raise Incomplete(f"{path!r} is missing. Fetch or build the bundle again") from error
    except OSError as error:
        if error.errno in {errno.ELOOP, errno.ENOTDIR}:
            raise PathEscape(f"{path!r} is, or lies behind, a symbolic link or a plain file") from error
        hint = ". Raise the limit with `ulimit -n`" if error.errno in {errno.EMFILE, errno.ENFILE} else ""
        raise IntegrityError(f"{path!r} cannot be read: {error.strerror or error}{hint}") from error
