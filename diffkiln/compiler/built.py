"""What is given back for a bundle that was published."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Built:
    """A bundle that was published.

    Attributes:
        path: its directory.
        id: SHA-256 of its manifest.
        notices: what a user should know.
        seconds: of each step of the build.
    """

    path: Path
    id: str
    notices: tuple[str, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
