"""Tokenizers of strangers, within limits.

A `tokenizer.json` is a small program: its normalizer can double a text forty times over, its expressions can search for
hours, and the library panics, or ends the process, where it has no better answer. So a file is looked at before the
library reads it, and a text before it is tokenized.
"""

from __future__ import annotations

import base64
import binascii
import json
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from tokenizers import Tokenizer

from diffkiln.errors import IntegrityError, LimitExceeded, ManifestInvalid
from diffkiln.guards.limits import active

#: What the steps of a tokenizer make of one character at most. U+FDFA has eighteen characters in NFKC and NFKD.
_GROWTH = {
    "NFC": 3, "NFD": 4, "NFKC": 18, "NFKD": 18, "Lowercase": 3, "Strip": 1, "StripAccents": 1, "Nmt": 1,
    "BertNormalizer": 12, "ByteLevel": 4, "Metaspace": 2, "WhitespaceSplit": 1, "Whitespace": 1, "BertPreTokenizer": 1,
    "Split": 1, "Punctuation": 1, "CharDelimiterSplit": 1, "Digits": 1, "UnicodeScripts": 1, "FixedLength": 1,
}  # fmt: skip
#: Characters that a text may have at most between two steps, per character that `text_chars` allows.
_ROOM = 1_000
#: Characters of the first piece of a text that an expression is tried on; each further piece is twice as long.
_PIECE = 16
#: Seconds of a CPU that one piece may take. The next one, twice as long, takes a few times that.
_PIECE_SECONDS = 1.0


class _Growth(NamedTuple):
    """The growth of a text of n characters in a step: at most n times `factor`, and `more` at each end and between any
    two.
    """

    step: str
    factor: int
    more: int = 0


class BoundedTokenizer:
    """A tokenizer that takes no more memory and time than the limits allow.

    Args:
        data: The content of `tokenizer.json`.
        where: Its name, for messages.

    Raises:
        ManifestInvalid: It is not a tokenizer.
        LimitExceeded: It is larger, or asks for more, than the limits allow.
    """

    def __init__(self, data: str | bytes, where: str) -> None:
        active().check("json_bytes", len(data), where)
        self.where = where
        try:
            table = json.loads(data)
            normalizer, splitter = table.get("normalizer"), table.get("pre_tokenizer")
            steps = [*_steps(normalizer), *_steps(splitter)]
            self._searches = any("Regex" in str(step.get("pattern")) for step in steps)
            self._growths = [_growth(step) for step in steps]
            self._check_added(table.get("added_tokens") or [], [_growth(step) for step in _steps(normalizer)])
            self._check_template(table.get("post_processor"))
            self._check_model(table.get("model"))
        except IntegrityError:
            raise
        except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
            raise ManifestInvalid(f"{where!r} is not a tokenizer: {type(error).__name__}: {error}") from error
        text = data if isinstance(data, str) else data.decode()
        self.tokenizer = self._tried("read", lambda: Tokenizer.from_str(text))
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        active().check("tokens", self._tried("read", self._special_tokens), where)

    def admit(self, text: str) -> None:
        """Raises `LimitExceeded` if tokenizing `text` would take more than the limits allow."""
        limits, normalizer = active(), self.tokenizer.normalizer
        limits.check("text_chars", len(text), f"a prompt of {self.where}")
        self._check_growth(len(text), self._growths)
        if self._searches:
            self._try_pieces(text)
        if normalizer is not None:
            made = self.run(lambda: normalizer.normalize_str(text))
            limits.check("text_chars", len(made), f"what {self.where} makes of a prompt")

    def run(self, work: Callable[[], Any]) -> Any:
        """Returns what `work` gives, which calls the library.

        Raises:
            LimitExceeded: An expression takes too many steps.
            ManifestInvalid: The library panics for another reason.
        """
        return self._tried("tokenize a prompt with", work)

    def _try_pieces(self, text: str) -> None:
        """Tries longer and longer pieces, so that an expression that takes too long shows on a short one.

        The whole is tried too, in the library alone: lists of what it splits would have Python look for garbage, which
        takes longer than the splitting.
        """
        length = _PIECE
        while length < 2 * len(text):
            begun, piece = time.thread_time(), text[:length]
            self.run(lambda piece=piece: self.tokenizer.encode(piece, add_special_tokens=False))
            if time.thread_time() - begun > _PIECE_SECONDS:
                raise LimitExceeded(
                    f"{self.where}: it takes over {_PIECE_SECONDS:g} seconds for {len(piece)} characters of a prompt. "
                    "Shorten the prompt, or take a bundle with another tokenizer"
                )
            length *= 2

    def _check_growth(self, chars: int, growths: list[_Growth]) -> None:
        """Refuses steps that could make a text of this length too long to hold, whatever the text is."""
        most = _ROOM * active().text_chars
        for growth in growths:
            chars = max(chars, 1) * growth.factor + growth.more * (chars + 1)
            if chars > most:
                raise LimitExceeded(
                    f"{self.where}: its {growth.step} can make over {most:,} characters of one prompt. Shorten the "
                    "prompt, or raise the limit: limits=Limits(text_chars=…)"
                )

    def _check_added(self, rows: list[Mapping[str, Any]], growths: list[_Growth]) -> None:
        """Checks the added tokens, which the library normalizes when it reads the file."""
        if chars := sum(len(row["content"]) for row in rows if row.get("normalized")):
            self._check_growth(chars, growths)

    def _check_template(self, processor: Any) -> None:
        for step in _nested(processor, "processors"):
            texts = sum("Sequence" in piece for piece in step.get("single") or ())
            if texts > 1:
                raise ManifestInvalid(f"{self.where!r} repeats each prompt {texts} times, which no tokenizer does")

    def _check_model(self, model: Any) -> None:
        longest = model.get("max_input_chars_per_word", 0) if isinstance(model, dict) else 0
        if longest > 10_000:  # a word of n characters takes n² look-ups
            raise LimitExceeded(f"{self.where}: words of {longest:,} characters, and 10,000 are allowed")

    def _special_tokens(self) -> int:
        return self.tokenizer.num_special_tokens_to_add(False)

    def _tried(self, what: str, work: Callable[[], Any]) -> Any:
        try:
            return work()
        except (KeyboardInterrupt, SystemExit, MemoryError):
            raise
        except BaseException as error:  # a panic of the library is no Exception
            kind = LimitExceeded if "retry-limit" in str(error) else ManifestInvalid
            raise kind(f"cannot {what} {self.where!r}: {str(error)[:200] or type(error).__name__}") from error


def _steps(part: Any) -> Iterator[Mapping[str, Any]]:
    """Yields the steps of a normalizer or a splitter, in order; refuses unknown ones."""
    for name in ("normalizers", "pretokenizers"):
        if isinstance(part, dict) and name in part:
            yield from _nested(part, name)
            return
    yield from _nested(part, "normalizers")


def _nested(part: Any, name: str) -> Iterator[Mapping[str, Any]]:
    if part is None:
        return
    if part.get("type") == "Sequence":
        for step in part[name]:
            yield from _nested(step, name)
    else:
        yield part


def _growth(step: Mapping[str, Any]) -> _Growth:
    """Returns how much a step can lengthen a text."""
    match step["type"]:
        case "Replace" if pattern := str(step["pattern"].get("String", "")):
            return _Growth("Replace", max(1, -(-len(step["content"]) // len(pattern))))
        case "Replace":  # an expression may match between any two characters
            return _Growth("Replace", 1, len(step["content"]))
        case "Prepend":
            return _Growth("Prepend", 1, len(step["prepend"]))
        case "Precompiled":
            return _Growth("Precompiled", _longest_replacement(step["precompiled_charsmap"]))
        case str(kind) if kind in _GROWTH:
            return _Growth(kind, _GROWTH[kind])
        case kind:
            raise ManifestInvalid(f"a tokenizer's step {str(kind)[:100]!r} is not known to diffkiln")


def _longest_replacement(charsmap: str | None) -> int:
    """Returns the bytes of the longest string by which SentencePiece's table replaces a character.

    The table is the size of a trie (4 bytes), the trie, and strings that end with a zero.
    """
    try:
        table = base64.b64decode(charsmap or "", validate=True)
    except (binascii.Error, TypeError) as error:
        raise ManifestInvalid(f"a tokenizer's table of characters is malformed: {error}") from error
    return max(1, *map(len, table[4 + int.from_bytes(table[:4], "little") :].split(b"\0")))
