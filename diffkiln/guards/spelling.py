"""Words that were meant: the nearest of those that there are."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

#: Of a word that a stranger wrote, so much is compared.
_MAX_SHOWN = 60


def nearest(word: str, choices: Iterable[str]) -> str:
    """Returns the choice that is spelled most like `word`, or "" if none is near."""
    by_folded = {choice.casefold(): choice for choice in choices}
    near = difflib.get_close_matches(word[:_MAX_SHOWN].casefold(), by_folded, n=1)
    return by_folded[near[0]] if near else ""


def suggest(word: str, choices: Iterable[str]) -> str:
    """Returns `Did you mean "x"?` for the nearest choice, or "" if none is near."""
    near = nearest(word, choices)
    return f'Did you mean "{near}"?' if near else ""
