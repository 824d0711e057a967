"""Directories that this user alone may write to: caches, receipts, locks. One check for all of them.

What lies in them is trusted: engines that a build runs, receipts that open native code, bundles that were fetched. So
each is 0700 whatever the umask, and one that belongs to another user or is open to others is refused, not used.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path

from diffkiln.errors import BuildError, IntegrityError, PathEscape


@dataclass(frozen=True)
class Home:
    """A directory whose own directories are private.

    Attributes:
        path: where it is, such as ~/.cache/diffkiln.
        what: its name in messages.
        variable: the one of the environment that puts it elsewhere.
    """

    path: Path
    what: str
    variable: str

    def directory(self, name: str) -> Path:
        """Returns the private directory of this name, made if need be.

        Raises:
            PathEscape: a symbolic link or a file is there.
            IntegrityError: it belongs to another user, or others may write to it.
            BuildError: it cannot be made.
        """
        self._make(self.path / name)
        self._check(name)
        return self.path / name

    def existing(self, name: str) -> Path | None:
        """Returns the same, checked the same, where it exists, else `None`; nothing is made."""
        try:
            self._check(name)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise IntegrityError(f"{self.path / name} cannot be looked at: {error.strerror or error}") from error
        return self.path / name

    def _make(self, directory: Path) -> None:
        try:
            # One by one, since `parents=True` leaves those above to the umask, which may open them to all.
            for path in (*reversed(directory.parents), directory):
                if not path.exists():
                    path.mkdir(mode=0o700, exist_ok=True)
        except FileExistsError:
            pass  # something else lies there, and the check says what
        except OSError as error:
            raise BuildError(
                f"the {self.what} directory {directory} cannot be made: {error.strerror}. Set {self.variable} elsewhere"
            ) from error

    def _check(self, name: str) -> None:
        # Whoever can write to the upper one can put another in the lower one's place.
        for path in (self.path, self.path / name):
            status = os.lstat(path)
            if not stat.S_ISDIR(status.st_mode):
                raise PathEscape(f"{path} is not a real directory. Remove it, or set {self.variable} elsewhere")
            if status.st_uid != os.geteuid():
                raise IntegrityError(f"{path} belongs to another user. Set {self.variable} to a directory of yours")
            if status.st_mode & 0o022:
                raise IntegrityError(
                    f"{path} is open to other users, so what it holds may be theirs. Remove it, or, if nobody else "
                    f"could have written to it, run: chmod 700 {path}"
                )
        # What others could only read, as earlier versions left it, is closed to them from now on.
        if status.st_mode & 0o077:
            os.chmod(path, 0o700)


def closed_to_others(directory: Path) -> bool:
    """Returns True if nobody but root and this user can put another file in the place of one of this user's there."""
    status = os.stat(directory)
    open_to_others = status.st_mode & 0o022 and not status.st_mode & stat.S_ISVTX
    return status.st_uid in {os.geteuid(), 0} and not open_to_others
