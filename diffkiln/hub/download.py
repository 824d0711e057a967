"""Files of one commit, fetched by huggingface_hub into a staging directory and hashed as soon as they are there.

What an earlier run fetched is not fetched again: the client keeps notes beside the files (in NOTES), and every file is
hashed, whether it was fetched now or then. Only names that the bundle's manifest lists are ever asked for.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffkiln.bundle import FileEntry, Progress, sha256_file
from diffkiln.errors import DigestMismatch, HubError, Incomplete, ManifestInvalid
from diffkiln.hub.explained import asking
from diffkiln.hub.remote import Remote

if TYPE_CHECKING:
    from huggingface_hub import HfApi

NOTES = ".cache"
_AT_ONCE = 4


class _Stopped(Exception):
    """The end of a download because another file has failed or the user interrupted."""


class Download:
    """The download of `remote`'s files into the directory `root`."""

    def __init__(self, api: HfApi, remote: Remote, root: Path, progress: Progress | None = None) -> None:
        self.remote = remote
        self._api = api
        self._root = root
        self._progress = progress
        self._stop = threading.Event()
        self._lock = threading.Lock()

    def check_listed(self, rows: Sequence[FileEntry]) -> None:
        """Compares the manifest with the repository's list of files, before any file is fetched.

        Raises `Incomplete`, `DigestMismatch`, and `ManifestInvalid` for a name that the client's notes use.
        """
        for row in rows:
            listed = self.remote.files.get(row.path)
            if row.path.partition("/")[0] == NOTES:
                raise ManifestInvalid(f"{row.path!r} lies where huggingface_hub keeps its notes. Build it without")
            if listed is None:
                raise Incomplete(f"{self._at()} has no {row.path!r}, which its manifest names. Push the bundle again")
            if listed.size != row.size or listed.sha256 not in (None, row.sha256):
                raise DigestMismatch(
                    f"{self._at()}: {row.path!r} is not the file that the manifest names ({listed.size} bytes, the "
                    f"manifest says {row.size}). Push the bundle again"
                )

    def small(self, path: str, limit: int) -> bytes:
        """Returns the content of a file that the repository must list and that has at most `limit` bytes.

        Raises `HubError` if the file is missing, too large, or not of the listed size.
        """
        listed = self.remote.files.get(path)
        if listed is None:
            raise HubError(f"{self._at()} is not a diffkiln bundle: it has no {path}. Check the name and the revision")
        if listed.size > limit:
            raise HubError(f"{self._at()}: {path} has {listed.size} bytes, more than the {limit} that are accepted")
        data = self._fetch(path, listed.size).read_bytes()
        if len(data) != listed.size:
            self.forget(path)
            raise HubError(f"{self._at()}: {path} has another size than the Hub lists. Try again")
        return data

    def all(self, rows: Sequence[FileEntry]) -> None:
        """Fetches and hashes files, several at a time. The first failure, or Ctrl-C, stops the others.

        Raises `DigestMismatch` for a file that differs from the manifest, and what `asking` raises.
        """
        with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="diffkiln-pull") as pool:
            try:
                futures = [pool.submit(self._row, row) for row in rows]
                for future in wait(futures, return_when=FIRST_EXCEPTION).done:
                    future.result()
            except BaseException:
                self._stop.set()
                pool.shutdown(wait=True, cancel_futures=True)
                raise

    def forget(self, path: str) -> None:
        """Removes a fetched file, so that the next run fetches it anew."""
        (self._root / path).unlink(missing_ok=True)

    def drop_notes(self) -> None:
        shutil.rmtree(self._root / NOTES, ignore_errors=True)

    def _row(self, row: FileEntry) -> None:
        if self._stop.is_set():
            return
        target = self._fetch(row.path, row.size)
        if target.stat().st_size != row.size or sha256_file(target) != row.sha256:
            self.forget(row.path)
            raise DigestMismatch(
                f"{self._at()}: {row.path!r} as it was fetched is not the file that the manifest names: it was changed "
                "at the Hub or on the way. Pull again; if that does not help, push the bundle again"
            )

    def _fetch(self, path: str, size: int) -> Path:
        with asking(self.remote.repo, f"fetch {path} from"):
            self._api.hf_hub_download(
                self.remote.repo, path, revision=self.remote.commit, local_dir=self._root, tqdm_class=self._meter(size)
            )
        return self._root / path

    def _meter(self, size: int) -> type[Any]:
        """Returns a progress bar that counts and can stop: the client tells it of every chunk before it writes it."""
        from huggingface_hub.utils import tqdm

        download = self

        class Meter(tqdm):
            def __init__(self, *arguments: Any, **keywords: Any) -> None:
                super().__init__(*arguments, **keywords)
                self.received = int(keywords.get("initial") or 0)

            def update(self, n: float | None = 1) -> bool | None:
                self.received += int(n or 0)
                download._check_received(self.received, size, int(n or 0))
                return super().update(n)

            # Xet counts what it moves apart from what it writes; having these two, it tells `update` the latter alone.
            def update_transfer(self, n: float | None = 1) -> None:
                pass

            def set_transfer_postfix_str(self, *_: Any, **__: Any) -> None:
                pass

        return Meter

    def _check_received(self, received: int, size: int, now: int) -> None:
        if self._stop.is_set():
            raise _Stopped
        if received > size:
            raise DigestMismatch(f"{self._at()}: the Hub sends more for a file than the {size} bytes that it has")
        if self._progress is not None:
            with self._lock:
                self._progress(now)

    def _at(self) -> str:
        return f"{self.remote.repo} at {self.remote.commit[:12]}"
