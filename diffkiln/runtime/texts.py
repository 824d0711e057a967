"""What a call program says of its texts, checked before the first prompt comes."""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from diffkiln.bundle.manifest import problems
from diffkiln.errors import ManifestInvalid
from diffkiln.guards.limits import active
from diffkiln.program import Program

#: What a tokenizer gives.
KEYS = ("input_ids", "attention_mask", "token_type_ids")

_Id = Annotated[int, Field(ge=0, lt=2**32)]
_Side = Literal["left", "right"]


class _Strict(BaseModel):
    model_config: ClassVar[ConfigDict] = ConfigDict(frozen=True, strict=True, extra="ignore")


class _Row(_Strict):
    """One prompt of a batch, with its prefix and suffix, or a fixed text."""

    text: str | None = None
    keyword: str = ""
    index: int = 0
    prefix: str = ""
    suffix: str = ""


class _Text(_Strict):
    tokenizer: str
    rows: Annotated[list[_Row], Field(min_length=1)]
    transforms: list[Literal["ftfy", "html_unescape", "unquote", "strip", "collapse_whitespace", "lower"]]
    padding: Literal["max_length", "longest", "none", "do_not_pad"]
    max_length: Annotated[int, Field(ge=1)] | None
    truncation: bool
    add_special_tokens: bool
    padding_side: _Side
    truncation_side: _Side
    pad_id: _Id | None
    pad_token: str | None
    pad_type_id: _Id | None = 0
    marks: list[str] = []
    quotations: Literal["characters"] | None = None
    glyphs: Literal["double", "all"] | None = None
    form: Literal["edit_json"] | None = None
    prompt_tokens: list[Annotated[int, Field(ge=0)]] | None = None
    around: list[Annotated[int, Field(ge=0)]] = []
    cut: Annotated[int, Field(ge=1)] | None = None


def check_texts(program: Program, tokenizers: Collection[str]) -> None:
    """Checks the texts of a call program, and the inputs that are made of them.

    Raises:
        ManifestInvalid: One is malformed, or names a tokenizer that is not among `tokenizers`.
        LimitExceeded: One has more characters or tokens than the limits allow.
    """
    for index, given in enumerate(program.texts):
        where = f"text {index} of program {program.name!r}"
        try:
            text = _Text.model_validate(dict(given))
        except ValidationError as error:
            reasons = "\n".join(map(str, problems(error)))
            raise ManifestInvalid(f"{where} is not one:\n{reasons}") from error
        if text.tokenizer not in tokenizers:
            raise ManifestInvalid(f"{where} names the tokenizer {text.tokenizer!r}, which the bundle does not have")
        if text.padding == "max_length" and None in (text.max_length, text.pad_id, text.pad_token, text.pad_type_id):
            raise ManifestInvalid(f"{where} pads to a length, but names neither length nor padding")
        if reason := _miscounted(text):
            raise ManifestInvalid(f"{where} {reason}")
        active().check("tokens", len(text.rows) * (text.max_length or 1), where)
        for row in text.rows:
            active().check("text_chars", sum(map(len, (row.text or "", row.prefix, row.suffix))), where)
    for item in program.inputs:
        if item.source.get("kind") == "tokens" and item.source["key"] not in KEYS:
            raise ManifestInvalid(f"input {item.name!r}: a tokenizer gives no {item.source['key']!r}")


def _miscounted(text: _Text) -> str:
    """Returns what is wrong with the numbers of tokens that a text fixes."""
    if text.prompt_tokens is None:
        return ""
    if not len(text.rows) == len(text.prompt_tokens) == len(text.around):
        return "does not say how many tokens each of its rows has"
    if text.padding != "max_length" or text.max_length is None or max(text.prompt_tokens) > text.max_length:
        return "has more tokens than its length"
    return ""
