import os
import time

import pytest

from diffkiln.errors import SpecError
from diffkiln.spec.json_text import MAX_BYTES, MAX_DEPTH, MAX_VALUES, flaws, read_file, read_json


def places(text: bytes) -> list[str]:
    return [f"{problem.where}: {problem.reason}" for problem in flaws(read_json(text))]


def test_reads_json_with_a_byte_order_mark():
    assert read_json(b'\xef\xbb\xbf{"a": [1, 2.5, null]}') == {"a": [1, 2.5, None]}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"", "not JSON"),
        (b"{'a': 1}", "not JSON"),
        (b'{"a": 1,}', "not JSON"),
        (b'{"a": 1} // comment', "not JSON"),
        (b'{"a": "\x00"}', "not JSON"),
        (b"\xff\xfe{", "not UTF-8"),
        (b'{"a": "\xed\xa0\x80"}', "not UTF-8"),
        (b"9" * 5000, "thousands of digits"),
        (b" " * (MAX_BYTES + 1), "longer than"),
        (b"[" * 100_000, "nested"),
        (b'{"a":' * 100_000, "nested"),
        (b"[" * 100_000 + b"]" * 100_000, "nested"),
    ],
)
def test_refuses_text_that_is_not_sound_json(text, reason):
    with pytest.raises(SpecError, match=reason):
        read_json(text)


def test_says_where_the_json_breaks():
    with pytest.raises(SpecError, match="line 2, column 3"):
        read_json(b"{\n  oops: 1}")


def test_brackets_in_strings_do_not_nest():
    assert read_json(b'["' + b"[" * 1000 + b'\\"[["]') == ["[" * 1000 + '"[[']


def test_nesting_up_to_the_limit_is_read():
    assert flaws(read_json(b"[" * MAX_DEPTH + b"]" * MAX_DEPTH)) == []


@pytest.mark.parametrize("text", [b'"' + b'\\"' * 400_000 + b"\\", b'"' * 900_001, b'"\\' * 450_000])
def test_no_text_takes_quadratic_time(text):
    started = time.monotonic()
    with pytest.raises(SpecError):
        read_json(text)
    assert time.monotonic() - started < 10


def test_finds_repeated_keys_at_their_path():
    assert places(b'{"a": [{"b": 1, "c": 2, "b": 3}], "a": [{"b": 1, "b": 1}]}') == [
        '$: the key "a" is written twice',
        '$.a[0]: the key "b" is written twice',
    ]


def test_finds_numbers_that_are_not_finite():
    assert places(b'{"a": NaN, "b": [1e999, -Infinity, 1e308]}') == [
        "$.a: is not a finite number",
        "$.b[0]: is not a finite number",
        "$.b[1]: is not a finite number",
    ]


def test_finds_text_that_no_file_name_or_terminal_can_hold():
    found = places(b'{"a": "x\\u0000", "b": "\\ud800", "\\u0000": 1, "ok": "\\ud83d\\ude00"}')
    assert [line.split(":")[0] for line in found] == ["$", "$.a", "$.b"]


def test_values_from_python_are_bounded_too():
    cyclic: dict = {}
    cyclic["self"] = cyclic
    shared: list = []
    for _ in range(MAX_DEPTH - 1):
        shared = [shared, shared]
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    for value in (cyclic, shared, deep, [0] * (MAX_VALUES + 1)):
        with pytest.raises(SpecError, match=r"nested|more than"):
            flaws(value)
    assert [problem.reason for problem in flaws({3: 4})] == ["the key 3 is not text"]


class TestFile:
    def test_reads_a_file(self, tmp_path):
        path = tmp_path / "spec.json"
        path.write_bytes(b"{}")
        assert read_file(path) == b"{}"

    def test_refuses_what_is_no_readable_file(self, tmp_path):
        os.mkfifo(tmp_path / "pipe")
        for name, reason in {
            "absent.json": "no such file",
            ".": "is a directory",
            "pipe": "not a regular file",
            "nul\0": "no such file",
            "x" * 5000: "cannot be read",
        }.items():
            with pytest.raises(SpecError, match=reason):
                read_file(tmp_path / name)

    def test_reads_no_more_than_the_limit_of_a_large_file(self, tmp_path):
        path = tmp_path / "large"
        with path.open("wb") as file:
            file.truncate(10**9)
        assert len(read_file(path)) == MAX_BYTES + 1
