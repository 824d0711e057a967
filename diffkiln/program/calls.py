"""The programs of a call: one for each choice of what its caller may give besides prompts."""

from __future__ import annotations

from typing import NamedTuple


class Given(NamedTuple):
    """What the caller gives: negative prompts of its own, and latents to begin with."""

    negative: bool = False
    latents: bool = False

    @property
    def name(self) -> str:
        """Returns the program's name, in a bundle too."""
        return "call" + "+negative" * self.negative + "+latents" * self.latents


#: By the program's name.
GIVEN = {given.name: given for given in (Given(), Given(True), Given(False, True), Given(True, True))}
