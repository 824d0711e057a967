"""Calls whose shapes follow the prompt's length, recorded at a fixed one.

`fixed_lengths` replaces the methods concerned while a call or a component is recorded. What the rewrites claim is
verified at every build (diffkiln.verification): the call bit for bit, components within rounding.
"""

from __future__ import annotations

import contextlib
from typing import Any

from diffkiln.record.lengths import wan
from diffkiln.record.lengths.rewriting import Padding, Rewrite, fingerprint, replaced

REWRITES: tuple[Rewrite, ...] = (*wan.REWRITES,)


def fixed_lengths() -> contextlib.AbstractContextManager[None]:
    """While it lasts, the methods whose shapes follow the prompt's length have a fixed one."""
    return replaced(REWRITES)


def outdated(pipe: Any) -> str:
    """The methods of a pipeline and its components that have a rewrite, made for another text of them; "" if none."""
    classes = {base for part in (pipe, *pipe.components.values()) for base in type(part).__mro__}
    known = [(rewrite, owner) for rewrite in REWRITES for owner in rewrite.classes() if owner in classes]
    return ", ".join(f"{owner.__name__}.{rewrite.method}" for rewrite, owner in known if not rewrite.fits(owner))


__all__ = ["REWRITES", "Padding", "Rewrite", "fingerprint", "fixed_lengths", "outdated"]
