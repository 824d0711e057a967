"""Which names a file in a bundle may have. Pure text: nothing is opened, nothing is looked up.

A name that is safe here stays inside the bundle on every system that a bundle may be copied through, and
means the same file on all of them.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from pathlib import PurePosixPath

from diffkiln.errors import PathEscape

MAX_PATH_BYTES = 1024
MAX_COMPONENT_BYTES = 255

# Controls, invisible format characters (they reorder or hide text), surrogates, line separators.
_HIDDEN = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_WINDOWS_FORBIDDEN = re.compile(r'[<>:"|?*]')
_WINDOWS_DEVICE = re.compile(r"(?:con|prn|aux|nul|conin\$|conout\$|(?:com|lpt)[0-9¹²³]) *(?:\..*)?", re.I | re.S)


def check_path(text: str) -> PurePosixPath:
    """Returns the relative path that `text` names inside a bundle. Raises `PathEscape` for anything doubtful."""
    refuse_unsafe(text)
    return PurePosixPath(text)


def refuse_unsafe(text: str) -> None:
    """Raises `PathEscape` for a doubtful path, as `check_path` does, without making a path object."""
    if reason := _fault(text):
        raise PathEscape(f"the path {text[:100]!r} is refused: {reason}")


def check_unique(paths: Iterable[str]) -> None:
    """Refuses paths (each already checked) that some file system would take for the same file.

    Two paths collide if they, or directories above them, are equal after case folding or Unicode normalising, or if a
    file is also the directory of another. Raises `PathEscape`.
    """
    spelling: dict[str, str] = {}
    files: set[str] = set()
    directories: set[str] = set()
    for path in paths:
        if path in files:
            raise PathEscape(f"the path {path!r} is named twice")
        files.add(path)
        prefix = path
        while prefix and prefix not in directories:
            known = spelling.setdefault(_folded(prefix), prefix)
            if known != prefix:
                raise PathEscape(f"the paths {known!r} and {prefix!r} are the same name on some file systems")
            if prefix is not path:
                directories.add(prefix)
            prefix = prefix.rpartition("/")[0]
    if both := files & directories:
        raise PathEscape(f"the path {min(both)!r} is named as a file and as a directory")


def _folded(path: str) -> str:
    if path.isascii():
        return path.lower()
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", path).casefold())


def _fault(text: str) -> str | None:
    if not text:
        return "it is empty"
    plain = text.isascii()
    if _CONTROL.search(text) or not (plain or _HIDDEN.isdisjoint(map(unicodedata.category, text))):
        return "it holds a control or invisible character"
    if len(text.encode()) > MAX_PATH_BYTES:
        return f"it is longer than {MAX_PATH_BYTES} bytes"
    if text.startswith("/"):
        return "it is absolute"
    for component in text.split("/"):
        if reason := _component_fault(component):
            return reason
        # Some file systems store the compatibility form, in which "／" is a slash and "․․" two dots.
        if not plain and (reason := _component_fault(unicodedata.normalize("NFKC", component))):
            return reason
    return None


def _component_fault(component: str) -> str | None:
    if not component:
        return "it has an empty component"
    if component in {".", ".."}:
        return f"it has the component {component!r}"
    if len(component.encode()) > MAX_COMPONENT_BYTES:
        return f"a component is longer than {MAX_COMPONENT_BYTES} bytes"
    if "/" in component or "\\" in component:
        return "it holds a slash in disguise or a backslash"
    if found := _WINDOWS_FORBIDDEN.search(component):
        return f"it holds {found[0]!r}, which Windows forbids"
    if component[-1] in ". ":
        return "a component ends with a dot or a space"
    if _WINDOWS_DEVICE.fullmatch(component):
        return f"{component!r} is a device on Windows"
    return None
