"""Tokenizers of strangers take no more memory and time than the limits allow, and raise nothing but our errors."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import time
from typing import Any

import pytest

from diffkiln.errors import IntegrityError, LimitExceeded, ManifestInvalid
from diffkiln.guards.limits import Limits, applied
from diffkiln.guards.tokenizing import BoundedTokenizer

MODEL = {"type": "WordLevel", "vocab": {"a": 0, "<unk>": 1}, "unk_token": "<unk>"}


def text_of(**parts: Any) -> str:
    return json.dumps({"version": "1.0", "added_tokens": [], "model": MODEL} | parts)


def bounded(**parts: Any) -> BoundedTokenizer:
    return BoundedTokenizer(text_of(**parts), "text/t.json")


def encode(bounded: BoundedTokenizer, prompt: str) -> Any:
    bounded.admit(prompt)
    return bounded.run(lambda: bounded.tokenizer.encode(prompt))


def sequence(*steps: Any) -> dict[str, Any]:
    return {"type": "Sequence", "normalizers": list(steps)}


def template(pieces: list[Any], ids: int = 1) -> dict[str, Any]:
    special = {"a": {"id": "a", "ids": [0] * ids, "tokens": ["a"] * ids}}
    return {"type": "TemplateProcessing", "single": pieces, "pair": [], "special_tokens": special}


DOUBLE = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
SPECIAL = {"SpecialToken": {"id": "a", "type_id": 0}}
PROMPT = {"Sequence": {"id": "A", "type_id": 0}}
ADDED = {"id": 0, "single_word": False, "lstrip": False, "rstrip": False, "special": False}


def test_usual_tokenizer_is_read_and_admits_prompts() -> None:
    usual = bounded(
        normalizer=sequence({"type": "NFC"}, {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "}),
        pre_tokenizer={"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        post_processor=template([SPECIAL, PROMPT, SPECIAL]),
    )
    usual.admit("a  cat " * 1000)
    assert usual.tokenizer.num_special_tokens_to_add(False) == 2


def test_normalizer_that_grows_the_text_is_refused_before_it_does() -> None:
    grows = bounded(normalizer=sequence(*[DOUBLE] * 40))
    begun = time.process_time()
    with pytest.raises(LimitExceeded, match=r"text/t.json: its Replace can make over 50,000,000 characters"):
        grows.admit("a")
    assert time.process_time() - begun < 1


def test_normalizer_that_grows_the_tokens_it_adds_is_refused_before_the_library_reads_it() -> None:
    with pytest.raises(LimitExceeded, match="its Replace can make over"):
        bounded(normalizer=sequence(*[DOUBLE] * 40), added_tokens=[ADDED | {"content": "a", "normalized": True}])


def test_splitter_that_grows_the_text_is_refused() -> None:
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    with pytest.raises(LimitExceeded, match="its ByteLevel can make over"):
        bounded(pre_tokenizer={"type": "Sequence", "pretokenizers": [level] * 40}).admit("é")


@pytest.mark.parametrize("length", [10**5, 10**7])
def test_long_prompt_is_refused(length: int) -> None:
    with pytest.raises(LimitExceeded, match=f"text_chars is {length:,}, and 50,000 is allowed"):
        bounded().admit("a" * length)
    with applied(Limits(text_chars=10**7)):
        bounded().admit("a" * length)


@pytest.mark.parametrize("pattern", [r"(a+)+$", r"(a|a)*$", r"(?:a|a){23}(?=b)"])
@pytest.mark.parametrize("place", ["normalizer", "pre_tokenizer"])
def test_expression_that_never_ends_is_refused_within_seconds(pattern: str, place: str) -> None:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    replace = {"type": "Replace", "pattern": {"Regex": pattern}, "content": ""}
    slow = bounded(**{place: split if place == "pre_tokenizer" else replace})
    begun = time.process_time()
    with pytest.raises(LimitExceeded, match=r"text/t\.json"):
        slow.admit("a" * 20_000 + "!")
    assert time.process_time() - begun < 30


def test_special_tokens_beyond_the_limit_are_refused() -> None:
    with pytest.raises(LimitExceeded, match="tokens is 1,000,000, and 262,144 is allowed"):
        bounded(post_processor=template([SPECIAL] * 1000, ids=1000))


def test_template_that_repeats_the_prompt_is_refused() -> None:
    with pytest.raises(ManifestInvalid, match="repeats each prompt 1000 times"):
        bounded(post_processor={"type": "Sequence", "processors": [template([PROMPT] * 1000)]})


def test_words_that_take_too_many_look_ups_are_refused() -> None:
    model = {"type": "WordPiece", "vocab": {"a": 0}, "unk_token": "a", "max_input_chars_per_word": 10**9}
    with pytest.raises(LimitExceeded, match="words of 1,000,000,000 characters"):
        bounded(model=model)


@pytest.mark.parametrize(
    "parts",
    [
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "not base64"}},
        {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
        {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}},
        {"normalizer": {"type": "Unheard"}},
        {"normalizer": 3},
        {"model": None},
        {"added_tokens": [{"content": 3, "normalized": True}]},
        {"normalizer": json.loads("[" * 500 + "]" * 500)},
    ],
)
def test_what_the_library_panics_at_is_refused(parts: dict[str, Any]) -> None:
    with pytest.raises(IntegrityError):
        encode(bounded(**parts), "aaa")


@pytest.mark.parametrize("data", [b"", b"[]", b"null", b"\xff", b"{" * 10**5])
def test_what_is_no_tokenizer_is_refused(data: bytes) -> None:
    with pytest.raises(ManifestInvalid):
        BoundedTokenizer(data, "text/t.json")


def test_long_replacements_of_a_table_count() -> None:
    table = base64.b64encode((0).to_bytes(4, "little") + b"x" * 100_000 + b"\0").decode()
    with pytest.raises(IntegrityError):
        bounded(normalizer={"type": "Precompiled", "precompiled_charsmap": table}).admit("a" * 1000)


def test_growth_is_refused_in_a_process_of_little_memory() -> None:
    """The library ends the process where it is out of memory, so that no exception could tell."""
    code = (
        "import resource, sys\n"
        "from diffkiln.guards.tokenizing import BoundedTokenizer\n"
        "from diffkiln.errors import LimitExceeded\n"
        "resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))\n"
        "try: BoundedTokenizer(sys.stdin.read(), 't').admit('a' * 100)\n"
        "except LimitExceeded: print('refused')"
    )
    text = text_of(normalizer=sequence(*[DOUBLE] * 40))
    done = subprocess.run([sys.executable, "-c", code], input=text, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "refused\n"), done.stderr
