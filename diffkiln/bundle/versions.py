"""Version specifiers as manifests have them: `>=2.6.3,<3`, `==2.13.*`.

Of a version the first three numbers count, so that 4.0.0b36 is a 4: what is required may exist as a beta alone.
"""

from __future__ import annotations

import re

#: A distribution's name, as PEP 508 has it.
PACKAGE = r"^[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?$"
_VERSION = (
    r"(?:[0-9]+!)?[0-9]+(?:\.[0-9]+)*"
    r"(?:[._-]?(?:alpha|beta|preview|pre|rc|a|b|c)[._-]?[0-9]*)?"
    r"(?:-[0-9]+|[._-]?(?:post|rev|r)[._-]?[0-9]*)?(?:[._-]?dev[._-]?[0-9]*)?"
    r"(?:\+[A-Za-z0-9]+(?:[._-][A-Za-z0-9]+)*)?(?:\.\*)?"
)
_CLAUSE = rf" *(?:===|~=|==|!=|<=|>=|<|>) *{_VERSION} *"
#: A version specifier, as PEP 440 has it; the empty one wants any version.
SPECIFIER = rf"^(?:{_CLAUSE}(?:,{_CLAUSE})*,?)?$"

_PART = re.compile(r"(==|>=|<)\s*([0-9.]+?)(\.\*)?", re.ASCII)


def fits(found: str, wanted: str) -> bool:
    """Returns True if the specifier accepts the version; an empty specifier accepts any.

    Raises:
        ValueError: this diffkiln cannot read the specifier.
    """
    return all(_fits(numbers(found), part) for part in filter(None, (piece.strip() for piece in wanted.split(","))))


def numbers(version: str) -> tuple[int, ...]:
    """Returns the first three numbers of a version."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


def _fits(found: tuple[int, ...], part: str) -> bool:
    match = _PART.fullmatch(part)
    if match is None:
        raise ValueError(f"{part!r} is not a version specifier")
    operator, version, any_patch = match.groups()
    wanted = numbers(version)
    if any_patch:
        found = found[: len(wanted)]
    return {"==": found == wanted, ">=": found >= wanted, "<": found < wanted}[operator]
