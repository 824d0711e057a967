"""The adapters that requests may ask for: files of one folder, a few of which are loaded at a time."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffkiln.errors import CallError
from diffkiln.guards.spelling import suggest
from diffkiln.serving.refusals import Refusal

#: A name that a request may say: the file's, without its ending. No path, and no hidden file.
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")
#: Adapters that one request may mix.
MOST = 8
_ENDING = ".safetensors"
#: What tells that a file is another one by now: inode, size, and time of its last change in nanoseconds.
_Stamp = tuple[int, int, int]


class Loras:
    """The adapters of a server. The pipeline's thread loads them, and forgets those that were used longest ago.

    Args:
        folder: What is in it may be asked for, by the files' names without `.safetensors`.
        kept: How many are loaded at most, besides those of the call that runs.
    """

    def __init__(self, folder: Path, kept: int) -> None:
        self._folder, self._kept = folder, kept
        self._loaded: OrderedDict[str, _Stamp] = OrderedDict()

    def ready(
        self, pipe: Any, mixes: Sequence[Mapping[str, float]]
    ) -> Mapping[str, float] | Sequence[Mapping[str, float]]:
        """Loads the adapters of a call, where they are not loaded yet; returns the mix of all rows, or those of each.

        Raises:
            CallError: A file is gone, or is no adapter of the bundle.
        """
        names = dict.fromkeys(name for mix in mixes for name in mix)
        for name in names:
            stamp = _stamp(self._folder / f"{name}{_ENDING}")
            if stamp is None:
                raise CallError(f"lora: {name} is no longer offered. Ask for another one")
            if self._loaded.get(name) != stamp:
                self._forget(pipe, name)
                pipe.load_lora(self._folder / f"{name}{_ENDING}", name=name, scale=0)
                self._loaded[name] = stamp
            self._loaded.move_to_end(name)
        for name in [name for name in self._loaded if name not in names][: max(0, len(self._loaded) - self._kept)]:
            self._forget(pipe, name)
        return mixes if len(mixes) > 1 else mixes[0]

    def _forget(self, pipe: Any, name: str) -> None:
        if self._loaded.pop(name, None) is not None:
            pipe.unload_lora(name)


def check_offered(folder: Path, mix: Mapping[str, float]) -> None:
    """Checks that a request asks for adapters of the folder. Raises `Refusal`, with the names that were meant."""
    for name in mix:
        if not NAME.fullmatch(name) or _stamp(folder / f"{name}{_ENDING}") is None:
            hint = suggest(name, offered(folder)) or "GET /v1/models lists those that are"
            raise Refusal(400, f"lora: {name[:60]!r} is not offered here. {hint}", "lora")


def offered(folder: Path) -> list[str]:
    """Returns the names of the adapters in a folder."""
    names = (path.stem for path in folder.glob(f"*{_ENDING}") if path.is_file())
    return sorted(name for name in names if NAME.fullmatch(name))


def _stamp(path: Path) -> _Stamp | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return (found.st_ino, found.st_size, found.st_mtime_ns) if path.is_file() else None
