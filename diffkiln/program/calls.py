"""The programs of a call: one for each choice of what its caller may give besides prompts."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Given:
    """What the caller gives: negative prompts of its own, and latents to begin with."""

    negative: bool = False
    latents: bool = False

    @property
    def name(self) -> str:
        """The program's name, in a bundle too."""
        return "call" + "+negative" * self.negative + "+latents" * self.latents


#: By the program's name.
GIVEN: Mapping[str, Given] = {
    given.name: given for given in itertools.starmap(Given, itertools.product((False, True), repeat=2))
}
