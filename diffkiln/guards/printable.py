"""The gate for every string that reaches a terminal, a log or a model card.

A bundle, a source or a server may put anything into a string: escape sequences that move the cursor, marks that turn
the direction of text, characters that take no room. Here they become visible escapes, such as `\\x9b` or `\\u202e`.
"""

from __future__ import annotations

import json
import logging
import re
import unicodedata
from typing import Any

#: No error or log line is longer, in characters.
MAX_MESSAGE = 20_000

# Controls; format characters, which turn the direction of text or take no room; lone surrogates, which no stream can
# encode; line separators; private and unassigned characters, which a font may draw as anything.
_HIDDEN = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})
# An underscore within a word marks nothing.
_MARKDOWN = re.compile(r"(^[-+=#]|[\\`*\[\]|~]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9]))")
# Where what looks like an address is parted, and what parts it: renderers make links of bare addresses, and they decode
# entities before they do.
_ADDRESS = re.compile(r"(?i)(?<=:)(?=//)|(?<=\bwww)(?=\.)|(?=@)")
_BREAK = "<!-- -->"


def printable(text: str, limit: int | None = None, *, lines: bool = False) -> str:
    """Returns `text` with every hidden character escaped, cut to `limit` characters.

    Args:
        text: Anything.
        limit: The most characters to return; None for all of them.
        lines: Whether line breaks and tabs stay what they are.
    """
    if limit is not None and len(text) > limit:
        text = text[: max(limit - 1, 0)] + "…"
    if text.isprintable():
        return text
    return "".join(_shown(character, lines) for character in text)


def printable_json(data: Any) -> str:
    """Returns `data` as indented JSON. Hidden characters are JSON escapes, so a parser reads what was there."""
    text = json.dumps(data, indent=2, ensure_ascii=False)
    return "".join(json.dumps(c)[1:-1] if c != "\n" and _is_hidden(c) else c for c in text)


def markdown(text: str) -> str:
    """Returns `text` as one line of Markdown that shows exactly these characters: no markup, no HTML, no link."""
    line = " ".join(printable(text, lines=True).split())
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _ADDRESS.sub(_BREAK, _MARKDOWN.sub(r"\\\1", line))


def markdown_code(text: str) -> str:
    """Returns `text` as one line of Markdown in a code span that nothing within it ends."""
    line = " ".join(printable(text, lines=True).split())
    longest = max((len(run) for run in re.findall("`+", line)), default=0)
    fence = "`" * (longest + 1)
    room = " " if longest else ""
    return f"{fence}{room}{line}{room}{fence}"


def get_logger(name: str) -> logging.Logger:
    """Returns the logger called `name`, whose records show hidden characters of their arguments escaped."""
    logger = logging.getLogger(name)
    if _gate not in logger.filters:
        logger.addFilter(_gate)
    return logger


def _gate(record: logging.LogRecord) -> bool:
    if isinstance(record.args, tuple):
        record.args = tuple(map(_argument, record.args))
    return True


def _argument(value: Any) -> Any:
    return value if isinstance(value, int | float) else printable(str(value), MAX_MESSAGE, lines=True)


def _shown(character: str, lines: bool) -> str:
    if not _is_hidden(character) or (lines and character in "\n\t"):
        return character
    return character.encode("unicode_escape").decode()


def _is_hidden(character: str) -> bool:
    return not character.isprintable() and unicodedata.category(character) in _HIDDEN
