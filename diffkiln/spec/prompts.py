"""Files of prompts: text that people wrote, one prompt a line."""

from __future__ import annotations

import hashlib
import stat
from collections.abc import Iterable
from pathlib import Path

from diffkiln.errors import Problem, SourceError

#: A file is read whole; one that is larger is something else.
MOST = 2**20
_HINT = "Write one: a prompt a line."


def read_prompts(path: Path, where: str = "", most: int = MOST) -> list[str]:
    """Returns the prompts of a text file; empty lines do not count.

    Args:
        path: of the file.
        where: the JSON path of its name in a spec.
        most: bytes that the file may have.

    Raises:
        SourceError: there is no such file, it is no text, or it holds no prompt.
    """
    try:
        status = path.stat()
        whole = stat.S_ISREG(status.st_mode) and status.st_size <= most  # reading a pipe would wait
        text = path.read_bytes().decode() if whole else None
    except FileNotFoundError:
        raise _refused(where, f"there is no file of prompts {path}") from None
    except (OSError, UnicodeDecodeError):
        text = None
    if text is None:
        raise _refused(where, f"{path} is no text file in UTF-8 of at most {most >> 20} MB")
    prompts = [line.strip() for line in text.splitlines() if line.strip()]
    if not prompts:
        raise _refused(where, f"the file {path} holds no prompt: every line is empty")
    return prompts


def digest_of(prompts: Iterable[str]) -> str:
    """Returns what stands for prompts in a bundle instead of a path: "sha256:" and the digest of their lines."""
    return "sha256:" + hashlib.sha256("\n".join(prompts).encode()).hexdigest()


def _refused(where: str, reason: str) -> SourceError:
    return SourceError(problems=[Problem(where, reason, _HINT)])
