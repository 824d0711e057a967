"""What is done to a prompt on its way to a tokenizer, as the texts of a program name it. The lists are closed: what a
bundle may name is part of its format."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from diffkiln.errors import MissingDependency


def _ftfy(text: str) -> str:
    try:
        import ftfy
    except ImportError:
        raise MissingDependency("this bundle cleans its prompts with ftfy: pip install ftfy") from None
    return ftfy.fix_text(text)


#: What a pipeline may do to a whole prompt, in the order in which pipelines do it.
TRANSFORMS: dict[str, Callable[[str], str]] = {
    "ftfy": _ftfy,
    "html_unescape": lambda text: html.unescape(html.unescape(text)),
    "unquote": lambda text: re.sub(r'["\u201c\u201d\u2018\u2019]', " ", text),
    "strip": str.strip,
    "collapse_whitespace": lambda text: re.sub(r"\s+", " ", text).strip(),
    "lower": str.lower,
}


@dataclass(frozen=True)
class Spelling:
    """A rule by which text between a pair of marks is tokenized character by character, with the marks.

    Attributes:
        pairs: the opening and the closing mark of each pair.
        within_words: no mark where it stands between two letters.
        shown: the rule as listings of programs have it.
    """

    pairs: tuple[str, ...]
    within_words: str
    shown: str

    @cached_property
    def word(self) -> re.Pattern[str]:
        """Returns a word that holds no mark, though it looks like one."""
        return re.compile(f"[a-zA-Z]+{re.escape(self.within_words)}[a-zA-Z]+")

    @cached_property
    def _marked(self) -> re.Pattern[str]:
        marked = (f"{first}[^{''.join(sorted({first, last}))}]*?{last}" for first, last in self.pairs)
        return re.compile(f"({'|'.join(marked)})")

    def pieces(self, prompt: str) -> list[str]:
        """Returns the parts of a prompt that are tokenized one by one.

        As diffusers' `split_quotation`, but for prompts that have several different words with an apostrophe within:
        there diffusers puts some of them in the place of the others, in an order that follows Python's hash seed.
        """
        hidden = prompt
        for word in set(self.word.findall(prompt)):
            hidden = hidden.replace(word, word.replace(self.within_words, "\x00"))
        found: list[str] = []
        for part in self._marked.split(hidden):
            shown = part.replace("\x00", self.within_words)
            if self._marked.match(shown):
                found += shown
            elif shown:
                found.append(shown)
        return found


#: How a prompt is taken apart: the key of a text, what it says → the rule. A key is a feature of the bundle, too.
RULES: Mapping[str, Mapping[str, Spelling]] = {
    "quotations": {
        "characters": Spelling(("''", '""', "\u2018\u2019", "\u201c\u201d"), "'", "quotations by character"),
    }
}


_DOUBLE = (r"\"(.*?)\"", "\u201c(.*?)\u201d")
#: What a prompt may not hold: the key of a text, what it says → what finds it. A key is a feature of the bundle, too.
FORBIDDEN: Mapping[str, Mapping[str, re.Pattern[str]]] = {
    "glyphs": {
        "double": re.compile("|".join(_DOUBLE)),
        "all": re.compile("|".join((*_DOUBLE, r"\'(.*?)\'", "\u2018(.*?)\u2019"))),
    }
}


def is_forbidden(text: Mapping[str, Any], prompt: str) -> bool:
    """Returns True if the prompt of a text holds what it may not hold."""
    found = (patterns.get(text.get(key, "")) for key, patterns in FORBIDDEN.items())
    return any(pattern.search(prompt) for pattern in found if pattern is not None)


@dataclass(frozen=True)
class Form:
    """What a prompt must be to be taken.

    Attributes:
        is_met: a prompt → whether it is so.
        made_of: a text → a prompt that holds it and is so.
        hint: what to write, for a refusal.
    """

    is_met: Callable[[str], bool]
    made_of: Callable[[str], str]
    hint: str


def _is_edit(prompt: str) -> bool:
    if "edit_instruction" not in prompt:
        return False
    try:
        json.loads(prompt)
    except (ValueError, RecursionError):
        return False
    return True


#: What the texts of the keyword "prompt" must be: the key of a text, what it says → the form. A key is a feature of the
#: bundle, too.
FORMS: Mapping[str, Mapping[str, Form]] = {
    "form": {
        "edit_json": Form(
            _is_edit,
            lambda text: json.dumps({"edit_instruction": text}, ensure_ascii=False),
            'Write {"edit_instruction": "…"}',
        )
    }
}


def form_of(text: Mapping[str, Any], keyword: str) -> Form | None:
    """Returns what the prompts of this keyword must be; None where any text will do."""
    if keyword != "prompt":
        return None
    found = (forms.get(text.get(key, "")) for key, forms in FORMS.items())
    return next((form for form in found if form is not None), None)


#: The key of a text that fixes how many tokens each of its rows has; a feature of the bundle, too.
COUNTED = "prompt_tokens"


def rules_of(text: Mapping[str, Any]) -> list[Spelling]:
    """Returns the rules that a text names. Names that are none are refused before (diffkiln.runtime.texts)."""
    return [rule for key, rules in RULES.items() for name, rule in rules.items() if text.get(key) == name]
