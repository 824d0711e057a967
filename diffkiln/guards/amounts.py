"""Amounts of memory as people write them."""

from __future__ import annotations

import re

_UNITS = {"": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_BY_NAME = {name.casefold(): size for name, size in _UNITS.items()}
_AMOUNT = re.compile(r"(\d{1,15}(?:\.\d{1,6})?)\s*([A-Za-z]{0,3})")


def bytes_of(amount: str | int) -> int:
    """Returns an amount of memory in bytes: "8GiB" is 8 × 2³⁰, "8 GB" is 8 × 10⁹, and a number is bytes already.

    Raises:
        ValueError: it is no amount, or none that is more than zero; the message says what to write.
    """
    if isinstance(amount, str):
        found = _AMOUNT.fullmatch(amount.strip())
        unit = _BY_NAME.get(found[2].casefold()) if found else None
        size = int(float(found[1]) * unit) if found and unit else 0
    else:
        size = amount if isinstance(amount, int) and not isinstance(amount, bool) else 0
    if size <= 0:
        raise ValueError(f'{str(amount)[:40]!r} is no amount of memory. Write a number of bytes, "8GiB" or "8GB"')
    return size
