"""Whole bundles of strangers, with digests that fit: looked at, loaded and called."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import diffkiln
from diffkiln import cli
from diffkiln.errors import CallError, LimitExceeded, ManifestInvalid
from tests.fuzz.bundles import FROZEN, change

TOKENIZER, CALL = "text/tokenizer.json", "programs/64x64-2-steps.json"


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    shutil.copytree(FROZEN, tmp_path / "bundle")
    return tmp_path / "bundle"


def edited(bundle: Path, name: str, edit: Callable[[Any], object]) -> None:
    def as_json(content: bytes) -> bytes:
        table = json.loads(content)
        edit(table)
        return json.dumps(table).encode()

    change(bundle, name, as_json)


def inspected(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    code = cli.main(["inspect", *arguments])
    found = capsys.readouterr()
    return code, found.out + found.err


@pytest.mark.parametrize("prompt", ["\ud800", "a\udcffb", ["a", "\udfff"]])
def test_prompt_that_is_not_utf8_is_a_call_error(prompt: Any) -> None:
    with diffkiln.load(FROZEN) as pipe, pytest.raises(CallError, match="half of a character"):
        pipe(prompt)


def test_prompt_of_a_megabyte_is_refused_at_once() -> None:
    with diffkiln.load(FROZEN) as pipe:
        begun = time.process_time()
        with pytest.raises(LimitExceeded, match="prompt: text_chars is 1,000,000, and 50,000 is allowed"):
            pipe("a" * 10**6)
    assert time.process_time() - begun < 5


def test_normalizer_that_grows_the_prompt_is_refused(bundle: Path) -> None:
    double = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
    edited(bundle, TOKENIZER, lambda table: table.update(normalizer={"type": "Sequence", "normalizers": [double] * 40}))
    with (
        diffkiln.load(bundle) as pipe,
        pytest.raises(LimitExceeded, match="its Replace can make over"),
    ):
        pipe("a black cat")


def test_length_that_no_memory_holds_is_refused_when_the_bundle_is_loaded(bundle: Path) -> None:
    edited(bundle, CALL, lambda table: table["programs"]["call"]["texts"][0].update(max_length=2**33))
    with pytest.raises(LimitExceeded, match="tokens is 8,589,934,592"):
        diffkiln.load(bundle)


def test_tokenizer_that_is_not_utf8_is_refused(bundle: Path) -> None:
    change(bundle, TOKENIZER, lambda _: b"\xff\xfe")
    with pytest.raises(ManifestInvalid, match="is not UTF-8 at byte 0"):
        diffkiln.load(bundle)


@pytest.mark.parametrize("content", [b"[" * 10**5, b'{"a": NaN}', b"", b"\xff"])
def test_inspect_refuses_a_program_that_is_none(bundle: Path, content: bytes, capsys) -> None:
    change(bundle, CALL, lambda _: content)
    code, said = inspected(capsys, str(bundle), "--program", Path(CALL).stem)
    assert (code, CALL in said) == (6, True), said


def test_inspect_takes_a_schedule_that_names_no_component(bundle: Path, capsys) -> None:
    row = {"name": "cache_schedule", "version": 1, "options": {}, "changed": True}
    edited(bundle, "manifest.json", lambda table: table["passes"].append(row))
    code, said = inspected(capsys, str(bundle))
    assert code == 6, said
    edited(bundle, "manifest.json", lambda table: table["passes"][-1].update(options={"component": "transformer"}))
    edited(bundle, CALL, lambda table: table.pop("programs"))
    code, said = inspected(capsys, str(bundle))
    assert (code, "programs are malformed" in said) == (6, True), said


@pytest.mark.parametrize("hidden", ["\x9b31m", "\u202e", "\u200b"])
def test_name_with_hidden_characters_is_refused_and_other_text_escaped(bundle: Path, hidden: str, capsys) -> None:
    edited(bundle, "manifest.json", lambda table: table["pipeline"]["variants"][0]["fixed"].update({hidden: hidden}))
    for more in ([], ["--json"]):
        code, said = inspected(capsys, str(bundle), *more)
        assert code == 0, said
        assert hidden[0] not in said
    edited(bundle, "manifest.json", lambda table: table["pipeline"].update(class_name=f"Flux{hidden}"))
    code, said = inspected(capsys, str(bundle))
    assert code == 6
    assert hidden[0] not in said


def test_advice_to_install_is_a_name_and_a_version(bundle: Path, capsys) -> None:
    edited(bundle, "manifest.json", lambda table: table["requires"].update(packages={"../../etc": ""}))
    with pytest.raises(ManifestInvalid, match=r"\$\.requires\.packages"):
        diffkiln.load(bundle)
