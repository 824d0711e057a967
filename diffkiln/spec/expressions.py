"""Regular expressions of a spec, which may come from a stranger: their search ends within a limit of time."""

from __future__ import annotations

import time
from collections.abc import Iterable

import regex

from diffkiln.errors import LimitExceeded
from diffkiln.guards.limits import active

#: No expression that names layers is longer, in characters.
_LONGEST = 1_000


class Expressions:
    """One or several expressions; a name matches if it matches any of them.

    Args:
        patterns: As Python's `re` takes them.

    Raises:
        ValueError: One is not a regular expression, or is too long.
    """

    def __init__(self, patterns: Iterable[str]) -> None:
        self._patterns = []
        for pattern in patterns:
            if len(pattern) > _LONGEST:
                raise ValueError(f"it has {len(pattern)} characters, and {_LONGEST} are the most")
            try:
                self._patterns.append(regex.compile(pattern))
            except regex.error as error:
                raise ValueError(str(error)) from error
        self._left = active().regex_seconds

    def found_in(self, name: str) -> bool:
        """Returns True if one of the expressions matches somewhere in `name`.

        Raises:
            LimitExceeded: All searches together have taken longer than the limits allow.
        """
        return any(self._search(pattern, name) for pattern in self._patterns)

    def _search(self, pattern: regex.Pattern[str], name: str) -> bool:
        begun = time.perf_counter()
        try:
            return pattern.search(name, timeout=max(self._left, 1e-6)) is not None
        except TimeoutError:
            raise LimitExceeded(
                f"the expression {pattern.pattern!r} takes over {active().regex_seconds} seconds for the names of the "
                "layers. Write it without repeats within repeats, such as `attn` in the place of `(.*attn.*)*`"
            ) from None
        finally:
            self._left -= time.perf_counter() - begun
