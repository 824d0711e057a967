"""Where a process that is asked on its standard input writes its answers."""

from __future__ import annotations

import os
import sys
from typing import TextIO


def own_output() -> TextIO:
    """The standard output for answers alone: what libraries print, those in C++ and child processes too, goes to the
    standard error."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    return answers
