from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffkiln.bundle import check_path, check_unique
from diffkiln.errors import PathEscape

ESCAPES = [
    "", "/", "/x", "..", "../x", "a/../../x", "a/..", ".", "./x", "a/./b", "a//b", "a/", "//server/share",
    "C:\\x", "C:/x", "c:x", "a\\..\\b", "\\\\server\\x", "a\0b", "a\nb", "a\x1b[2Jb", "a\x7fb", "a\x85b",
    "a" * 256, "a/" + "é" * 128, "/".join(["a" * 100] * 11), "name.", "name ", "dir./x", "dir /x", "...",
    "con", "NUL", "a/Aux.txt", "com1", "LPT9.log", "com¹", "CON .txt", "CONIN$", "file:stream", "a?b", "a*b",
    "a\u202eb", "a\u200bb", "a\u2028b", "a\ud800b", "a\uff0fb", "a/\uff0e\uff0e/b", "\u2024\u2024",
    "a\uff3cb", "a\uff1ab",
]  # fmt: skip


@pytest.mark.parametrize("path", ESCAPES)
def test_refuses_path_that_leaves_the_bundle_or_is_not_portable(path: str) -> None:
    with pytest.raises(PathEscape):
        check_path(path)


@pytest.mark.parametrize(
    "path", ["x", "a/b.json", ".hidden", "a..b/c", "conx", "com10", "a b/c", "é/ü", "a" * 255, "engines/cpu/Block/m.so"]
)
def test_accepts_plain_relative_path(path: str) -> None:
    assert str(check_path(path)) == path


@pytest.mark.parametrize(
    "paths",
    [
        ("a", "a"),
        ("a/B", "a/b"),
        ("A/x", "a/y"),
        ("straße", "STRASSE"),
        (unicodedata.normalize("NFC", "é"), unicodedata.normalize("NFD", "é")),
        ("ﬁle", "file"),
        ("K", "\u212a"),
        ("a", "a/b"),
        ("a/b", "a"),
    ],
)
def test_refuses_names_that_are_one_on_some_file_system(paths: tuple[str, str]) -> None:
    with pytest.raises(PathEscape):
        check_unique(paths)


def test_accepts_different_names_in_shared_directories() -> None:
    check_unique(["a/b/c", "a/b/d", "a/c", "b"])


@given(st.text(max_size=300))
def test_any_text_is_accepted_or_refused(text: str) -> None:
    try:
        path = check_path(text)
    except PathEscape:
        return
    assert str(path) == text
    assert not path.is_absolute()
    assert ".." not in path.parts
    check_unique([text])


@given(st.lists(st.text("aAbBé/ıİſK", min_size=1, max_size=6), max_size=8))
def test_uniqueness_holds_after_folding(texts: list[str]) -> None:
    try:
        check_unique(texts)
    except PathEscape:
        return
    assert len({unicodedata.normalize("NFKC", text).casefold() for text in texts}) == len(texts)
