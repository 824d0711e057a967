"""Prompts to tokens, as the recorded pipeline did it: transforms, template, tokenizer, padding."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Encoding, Tokenizer

from diffkiln.bundle.layout import tokenizer_file
from diffkiln.errors import CallError
from diffkiln.guards.limits import active
from diffkiln.guards.printable import get_logger
from diffkiln.guards.tokenizing import BoundedTokenizer
from diffkiln.program import Program
from diffkiln.program.text_rules import COUNTED, TRANSFORMS, Spelling, form_of, is_forbidden, rules_of
from diffkiln.runtime.texts import check_texts

log = get_logger(__name__)
#: So many numbers of tokens are listed in an error.
_FEW = 12


@dataclass(frozen=True)
class Miscount:
    """A prompt of another number of tokens than a variant takes.

    Attributes:
        keyword: of the prompt.
        found: its tokens, without those of the pipeline's own text.
        wanted: those that the variant takes.
    """

    keyword: str
    found: int
    wanted: int

    def __str__(self) -> str:
        field = "negative_prompt_tokens" if self.keyword.startswith("negative") else "prompt_tokens"
        return (
            f"{self.keyword}: {self.found} tokens, this variant takes {self.wanted}. Add {self.found} to {field!r} of "
            "the spec's inputs, or change the prompt"
        )


def counts_refusal(miscounts: Sequence[Miscount]) -> str:
    """Returns what is said if no variant takes prompts of these numbers of tokens."""
    first = miscounts[0]
    wanted = sorted({each.wanted for each in miscounts if each.keyword == first.keyword})
    if len(wanted) == 1:
        return str(first)
    field = "negative_prompt_tokens" if first.keyword.startswith("negative") else "prompt_tokens"
    counts = ", ".join(map(str, wanted[:_FEW])) + (f" and {len(wanted) - _FEW} more" if len(wanted) > _FEW else "")
    return (
        f"{first.keyword}: {first.found} tokens. The bundle takes {counts}. Add {first.found} to {field!r} of the "
        "spec's inputs, or change the prompt"
    )


def _unpadded(text: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a text as the pipeline cuts it, without padding."""
    return {**text, "padding": "none", "truncation": text.get("cut") is not None, "max_length": text.get("cut")}


def _pad(encoding: Encoding, text: Mapping[str, Any]) -> None:
    encoding.pad(
        text["max_length"],
        direction=text["padding_side"],
        pad_id=text["pad_id"],
        pad_type_id=text["pad_type_id"],
        pad_token=text["pad_token"],
    )


class TextEnd:
    """The encoder of prompts into the token tensors that a call program takes.

    Args:
        tokenizers: name in the pipeline → the tokenizer's JSON.
        programs: the call programs whose texts will be asked for.

    Raises:
        ManifestInvalid: a text of a program is none, or names a tokenizer that is not there.
        LimitExceeded: a text has more characters or tokens than the limits allow.
    """

    def __init__(self, tokenizers: Mapping[str, str], programs: Iterable[Program] = ()) -> None:
        self._json = dict(tokenizers)
        self._bounded: dict[str, BoundedTokenizer] = {}
        self._ready: dict[tuple[Any, ...], Tokenizer] = {}
        for program in programs:
            check_texts(program, self._json.keys())

    def encode(self, text: Mapping[str, Any], prompts: Mapping[str, Sequence[str]]) -> dict[str, torch.Tensor]:
        """Returns the tokens of one recorded text.

        Args:
            text: an entry of `Program.texts`.
            prompts: keyword → one prompt for each place in the batch.

        Returns:
            input_ids, attention_mask and token_type_ids, int64 [rows, length], on the CPU.

        Raises:
            CallError: a keyword has fewer prompts than the text has rows, or one that holds what stands for an image,
                or that is too long and must not be cut.
        """
        rows = [self._row(row, text, prompts) for row in text["rows"]]
        bounded = self._of(text["tokenizer"])
        for row in rows:
            bounded.admit(row)
        rules = rules_of(text)
        if COUNTED in text:
            encodings = self._encode_counted(text, rows)
        else:
            encodings = self._encode_pieces(text, rows, *rules) if rules else self._encode(text, rows)
        for row, source, encoding in zip(rows, text["rows"], encodings, strict=True):
            self._refuse_longer(text, source, len(encoding.ids))
            if encoding.overflowing:
                log.warning("the prompt %r… is cut to %d tokens by %s", row[:40], text["max_length"], text["tokenizer"])
        return {
            "input_ids": torch.tensor([e.ids for e in encodings], dtype=torch.int64),
            "attention_mask": torch.tensor([e.attention_mask for e in encodings], dtype=torch.int64),
            "token_type_ids": torch.tensor([e.type_ids for e in encodings], dtype=torch.int64),
        }

    def _encode(self, text: Mapping[str, Any], rows: list[str]) -> list[Encoding]:
        tokenizer = self._tokenizer(text)
        return self._of(text["tokenizer"]).run(
            lambda: tokenizer.encode_batch(rows, add_special_tokens=text["add_special_tokens"])
        )

    def miscounted(self, text: Mapping[str, Any], prompts: Mapping[str, Sequence[str]]) -> Miscount | None:
        """Returns the first prompt of a recorded text that has another number of tokens than the text; None if all fit.

        Raises:
            CallError: as `encode`.
        """
        if COUNTED not in text:
            return None
        rows = [self._row(row, text, prompts) for row in text["rows"]]
        bounded = self._of(text["tokenizer"])
        for row in rows:
            bounded.admit(row)
        found = [len(encoding.ids) for encoding in self._encode(_unpadded(text), rows)]
        for row, count, wanted, around in zip(text["rows"], found, text[COUNTED], text["around"], strict=True):
            if count != wanted:
                return Miscount(row.get("keyword", "prompt"), count - around, wanted - around)
        return None

    def _encode_counted(self, text: Mapping[str, Any], rows: list[str]) -> list[Encoding]:
        """Returns the tokens of rows that have the numbers of tokens that the text was recorded with."""
        encodings = self._encode(_unpadded(text), rows)
        for encoding, row, wanted, around in zip(encodings, text["rows"], text[COUNTED], text["around"], strict=True):
            if len(encoding.ids) != wanted:
                raise CallError(
                    str(Miscount(row.get("keyword", "prompt"), len(encoding.ids) - around, wanted - around))
                )
            _pad(encoding, text)
        return encodings

    def _encode_pieces(self, text: Mapping[str, Any], rows: list[str], rule: Spelling) -> list[Encoding]:
        """Returns the tokens of each row's pieces, in order; too many are cut at the end."""
        tokenizer = self._tokenizer({**text, "padding": "none", "truncation": False})
        encodings = []
        for row in rows:
            parts = self._of(text["tokenizer"]).run(
                lambda row=row: tokenizer.encode_batch(rule.pieces(row), add_special_tokens=False)
            )
            merged = Encoding.merge(parts, growing_offsets=False)
            if text["truncation"]:
                merged.truncate(text["max_length"])
            _pad(merged, text)
            encodings.append(merged)
        return encodings

    def _refuse_longer(self, text: Mapping[str, Any], row: Mapping[str, Any], count: int) -> None:
        most = text["max_length"]
        if text["padding"] == "max_length" and most and count > most:
            raise CallError(
                f"{row.get('keyword', 'a prompt')}: {count} tokens with the pipeline's own text; this variant "
                f"takes {most}. Shorten it, or compile for longer prompts"
            )

    def _row(self, row: Mapping[str, Any], text: Mapping[str, Any], prompts: Mapping[str, Sequence[str]]) -> str:
        if "text" in row:
            return row["text"]
        given = prompts[row["keyword"]]
        if row["index"] >= len(given):
            raise CallError(f"{row['keyword']}: {len(given)} prompts, this variant takes {row['index'] + 1} or more")
        prompt = str(given[row["index"]])
        for mark in text.get("marks", ()):
            if mark in prompt:
                raise CallError(f"{row['keyword']}: {mark} stands for an image or a video. Take it out of the prompt")
        active().check("text_chars", len(prompt), row["keyword"])
        if is_forbidden(text, prompt):
            raise CallError(
                f"{row['keyword']}: the pipeline shows what a prompt quotes to an encoder of its own, and this bundle "
                "was recorded without it. Leave out the quotation marks, or run the pipeline as diffusers"
            )
        if (form := form_of(text, row["keyword"])) and not form.is_met(prompt):
            raise CallError(f"{row['keyword']}: it is not of the form that the pipeline takes. {form.hint}")
        for name in text["transforms"]:
            prompt = TRANSFORMS[name](prompt)
        return row["prefix"] + prompt + row["suffix"]

    def _of(self, name: str) -> BoundedTokenizer:
        if name not in self._bounded:
            self._bounded[name] = BoundedTokenizer(self._json[name], tokenizer_file(name))
        return self._bounded[name]

    def _tokenizer(self, text: Mapping[str, Any]) -> Tokenizer:
        keys = (
            "tokenizer",
            "max_length",
            "truncation",
            "padding",
            "padding_side",
            "truncation_side",
            "pad_id",
            "pad_token",
        )
        key = tuple(text[name] for name in keys)
        if key not in self._ready:
            tokenizer = self._of(text["tokenizer"]).tokenizer
            if tokenizer in self._ready.values():  # with other padding: reading it again takes seconds, so only then
                tokenizer = copy.deepcopy(tokenizer)
            tokenizer.no_truncation()
            tokenizer.no_padding()
            if text["truncation"] and text["max_length"]:
                tokenizer.enable_truncation(text["max_length"], direction=text["truncation_side"])
            if text["padding"] == "max_length":
                tokenizer.enable_padding(
                    direction=text["padding_side"],
                    pad_id=text["pad_id"],
                    pad_type_id=text["pad_type_id"],
                    pad_token=text["pad_token"],
                    length=text["max_length"],
                )
            self._ready[key] = tokenizer
        return self._ready[key]
