"""The programs of a call: one for each choice of what its caller may give besides prompts; and what they give."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from diffkiln.program.ir import CALL, NOISE, Program

#: Results that are pictures, and those that are sound, by the names that diffusers gives them.
PICTURES, SOUNDS = ("images", "frames"), ("audios", "audio")


class Given(NamedTuple):
    """The optional arguments of a caller: its own negative prompts, and latents to begin with."""

    negative: bool = False
    latents: bool = False

    @property
    def name(self) -> str:
        """Returns the program's name, in a bundle too."""
        return "call" + "+negative" * self.negative + "+latents" * self.latents


#: By the program's name.
GIVEN = {given.name: given for given in (Given(), Given(True), Given(False, True), Given(True, True))}


def text_keywords(programs: Sequence[Program]) -> list[str]:
    """Returns the keywords whose texts reach a tokenizer."""
    rows = (row for program in programs for text in program.texts for row in text["rows"])
    return list(dict.fromkeys(row["keyword"] for row in rows if "keyword" in row))


def follows_noise(call: Program, component: str) -> bool:
    """Returns True if the call gives the component something that depends on its noise, as it gives a denoiser."""
    noisy = {item.name for item in call.inputs if item.source.get("keyword") == "latents"}
    for op in call.ops:
        if op.name == NOISE or any(ref.name in noisy for ref in op.uses):
            if op.name == CALL and op.attrs["component"] == component:
                return True
            noisy.update(op.outputs)
    return False
