"""The gate for strings: nothing that passes it moves a cursor, hides or turns text, or is markup."""

from __future__ import annotations

import ast
import json
import logging
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffkiln.bundle.versions import SPECIFIER
from diffkiln.cli.printing import print_table, say, show
from diffkiln.errors import DiffkilnError, Problem
from diffkiln.guards.printable import get_logger, markdown, markdown_code, printable, printable_json

HOSTILE = "a\x1b[2Jb\x9b31mc\u202ed\u2066e\u200bf\ud800g"
ESCAPED = r"a\x1b[2Jb\x9b31mc\u202ed\u2066e\u200bf\ud800g"
PACKAGE = Path(printable.__code__.co_filename).parent


def test_hidden_characters_become_visible_escapes() -> None:
    assert printable(HOSTILE) == ESCAPED
    assert printable("two\nlines") == r"two\nlines"
    assert printable("two\nlines", lines=True) == "two\nlines"
    assert printable("schön 日本\u3000語 🔥") == "schön 日本\u3000語 🔥"


def test_long_text_is_cut() -> None:
    assert printable("a" * 10**6, 100) == "a" * 99 + "…"


@given(st.text(st.characters()))
def test_whatever_passes_can_be_encoded_and_holds_no_control(text: str) -> None:
    for shown in (printable(text), markdown(text), markdown_code(text)):
        shown.encode()
        assert not any(c < " " or "\x7f" <= c < "\xa0" for c in shown)


@given(st.dictionaries(st.text(st.characters()), st.text(st.characters())))
def test_json_stays_the_same_json(data: dict[str, str]) -> None:
    shown = printable_json(data)
    shown.encode()
    # Two lone surrogates side by side become one character: JSON cannot tell them apart.
    assert json.loads(shown) == json.loads(json.dumps(data))


def test_every_error_of_ours_is_printable() -> None:
    assert str(DiffkilnError(HOSTILE)) == ESCAPED
    assert str(DiffkilnError(problems=[Problem("$.x", HOSTILE)])) == f"$.x: {ESCAPED}"
    assert len(str(DiffkilnError("a" * 10**7))) < 10**5


def test_terminal_output_is_printable(capsys: pytest.CaptureFixture[str]) -> None:
    show(HOSTILE)
    say(HOSTILE)
    print_table(("column",), [[HOSTILE], ["[link=https://evil.example]click[/link]"]])
    out, err = capsys.readouterr()
    assert err == f"{ESCAPED}\n"
    assert out.startswith(f"{ESCAPED}\n")
    assert "[link=https://evil.example]click[/link]" in out
    assert "\x1b" not in out


def test_log_arguments_are_printable(caplog: pytest.LogCaptureFixture) -> None:
    log = get_logger("diffkiln.test")
    with caplog.at_level(logging.WARNING):
        log.warning("%s, %d and %s", HOSTILE, 3, ValueError(HOSTILE))
    assert caplog.messages == [f"{ESCAPED}, 3 and {ESCAPED}"]


def test_specifiers_of_versions_are_those_of_pep_440() -> None:
    import re

    for good in ("", ">=1.0", "==2.13.*", ">=2.6.3,<3", "~=1.4", "!=1.0rc1", "==1!2.0.post1", ">= 3.0b2, < 4"):
        assert re.fullmatch(SPECIFIER, good), good
    for bad in ("1.0", ">=x", "; import os", ">=1 -e .", "@ file:///etc", ">=1\n"):
        assert not re.fullmatch(SPECIFIER, bad), bad


def test_nothing_prints_past_the_gate() -> None:
    for path in PACKAGE.rglob("*.py"):
        if path.name in ("printing.py", "printable.py"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            assert called not in ("click.echo", "click.secho", "print", "sys.stderr.write", "sys.stdout.write"), path
            own = called == "logging.getLogger" and ast.unparse(node.args[0]) in ("__name__", "'diffkiln'")
            assert not own, path
