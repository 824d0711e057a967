"""What a prompt quotes, which LongCat-Image gives to its tokenizer character by character."""

from __future__ import annotations

import re

_WITHIN_A_WORD = re.compile(r"[a-zA-Z]+'[a-zA-Z]+")
_PAIRS = ("''", '""', "\u2018\u2019", "\u201c\u201d")
_QUOTED = "|".join(f"{first}[^{''.join(sorted({first, last}))}]*?{last}" for first, last in _PAIRS)
#: Stands for an apostrophe within a word while quotations are looked for.
_APOSTROPHE = "\x00"


def pieces(prompt: str) -> list[str]:
    """The parts of a prompt that are tokenized one by one: what is quoted as its characters, the rest as it is.

    As diffusers' `split_quotation`, but for prompts that have several different words with an apostrophe within: there
    diffusers puts some of them in the place of the others, in an order that follows Python's hash seed.
    """
    hidden = prompt
    for word in set(_WITHIN_A_WORD.findall(prompt)):
        hidden = hidden.replace(word, word.replace("'", _APOSTROPHE))
    found: list[str] = []
    for part in re.split(f"({_QUOTED})", hidden):
        shown = part.replace(_APOSTROPHE, "'")
        if re.match(_QUOTED, shown):
            found += shown
        elif shown:
            found.append(shown)
    return found
