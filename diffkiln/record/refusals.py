"""What is said where a pipeline's own code raises: its own reason where it gives one, and never Python's words."""

from __future__ import annotations

import ast
import linecache
import re
import traceback
from collections.abc import Collection
from pathlib import Path

from diffkiln.errors import RecordError

_LIBRARIES = ("diffusers", "transformers")
_MOST = 300
#: How tensors and generators show in a message.
_OBJECTS = re.compile(r"(?:Fake)?[Tt]ensor\((?:[^()]|\([^()]*\))*\)|<torch[^<>]*>|<[\w. ]+ object at 0x[0-9a-f]+>")


class Refused(RecordError):
    """The pipeline refuses the call, and says why: diffusers would refuse it, too."""


def refusal(error: BaseException, sentinels: Collection[str] = ()) -> str:
    """Returns the reason that a library gives in a statement that raises; "" where it fails without one.

    Args:
        error: what a pipeline's call raised.
        sentinels: prompts of a recording, which no user has written.
    """
    frame = _last_frame(error)
    if frame is None or _library(frame.filename) is None or not _raises(frame):
        return ""
    return _shown(str(error), sentinels)


def code_of(error: BaseException) -> str:
    """Returns where a library's code failed: the function, the file and the line; "" where it did not."""
    found = [frame for frame in traceback.extract_tb(error.__traceback__) if _library(frame.filename)]
    if not found:
        return ""
    frame = found[-1]
    return f"{frame.name} ({_library(frame.filename)}, line {frame.lineno})"


def _last_frame(error: BaseException) -> traceback.FrameSummary | None:
    frames = traceback.extract_tb(error.__traceback__)
    return frames[-1] if frames else None


def _library(file: str) -> str | None:
    """Returns the path of a file within its library."""
    parts = Path(file).parts
    for name in _LIBRARIES:
        if name in parts:
            return "/".join(parts[parts.index(name) :])
    return None


def _raises(frame: traceback.FrameSummary) -> bool:
    """Returns True if the line is a statement that raises, or within one."""
    lines = linecache.getlines(frame.filename)
    try:
        tree = ast.parse("".join(lines))
    except SyntaxError:
        return False
    statements = (node for node in ast.walk(tree) if isinstance(node, ast.Raise))
    return any(node.lineno <= (frame.lineno or 0) <= (node.end_lineno or 0) for node in statements)


def _shown(text: str, sentinels: Collection[str]) -> str:
    """Returns a library's message in one line, without the recording's own prompts and the numbers of tensors."""
    for sentinel in sentinels:
        for form in (repr(sentinel), sentinel, " ".join(sentinel.split())):
            text = text.replace(form, "…")
    text = " ".join(_OBJECTS.sub("a tensor", text).split()).rstrip(".")
    return text if len(text) <= _MOST else f"{text[:_MOST]}…"
