from __future__ import annotations

import json
import sys
import time
from typing import Any

import pytest
import rfc8785
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from diffkiln.bundle import FileEntry, Manifest, TensorSpec, bundle_id, dump_manifest, parse_manifest
from diffkiln.errors import DiffkilnError, Incompatible, ManifestInvalid, PathEscape
from tests.bundle.making import manifest_of

ROW = FileEntry(path="programs/v0.json", size=3, sha256="0" * 64, role="program")
GOOD = dump_manifest(manifest_of((ROW,)))


def changed(*path: str | int, to: Any) -> bytes:
    raw = json.loads(GOOD)
    inner = raw
    for step in path[:-1]:
        inner = inner[step]
    inner[path[-1]] = to
    return json.dumps(raw).encode()


def test_what_is_dumped_is_canonical_and_parses_to_the_same() -> None:
    manifest = parse_manifest(GOOD)
    assert manifest == manifest_of((ROW,))
    assert dump_manifest(manifest) == GOOD == rfc8785.dumps(json.loads(GOOD))
    assert bundle_id(GOOD) == bundle_id(dump_manifest(manifest))
    assert len(bundle_id(GOOD)) == 64


def test_a_whole_float_becomes_an_int_in_canonical_json() -> None:
    manifest = manifest_of().model_copy(update={"runtime": {"scale": 1.0}})
    assert type(parse_manifest(dump_manifest(manifest)).runtime["scale"]) is int


@pytest.mark.parametrize("value", [2**60, float("nan"), "\ud800"])
def test_refuses_to_write_what_canonical_json_cannot_hold(value: Any) -> None:
    manifest = manifest_of().model_copy(update={"runtime": {"x": value}})
    with pytest.raises(ManifestInvalid):
        dump_manifest(manifest)


def test_the_manifest_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        parse_manifest(GOOD).files = ()  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"null",
        b"[]",
        b"{}",
        b'"' + b'\\"' * 1_000_000,
        b"[" * 100_000,
        b"[" * 100_000 + b"]" * 100_000,
        b'{"a":' * 100_000,
        GOOD[:-1],
        GOOD + b"x",
        b"\xef\xbb\xbf" + GOOD,
        GOOD.replace(b"tiny", b"\xff\xfe"),
        GOOD.replace(b"0.5", b"NaN"),
        GOOD.replace(b"0.5", b"-Infinity"),
        GOOD.replace(b"0.5", b"1e999"),
        GOOD.replace(b"0.5", b"1" * 5000),
        GOOD.replace(b'"tiny"', b'"\\ud800"'),
        GOOD.replace(b'{"digest"', b'{"model":"x","digest"'),
        GOOD.replace(b'{"digest"', b'{"\\u006dodel":"x","digest"'),
    ],
    ids=range(19),
)
def test_refuses_what_is_not_strict_json(data: bytes) -> None:
    assert data != GOOD
    with pytest.raises(ManifestInvalid):
        parse_manifest(data)


def test_refuses_a_manifest_of_200_mb_by_its_size() -> None:
    started = time.monotonic()
    with pytest.raises(ManifestInvalid, match="more than"):
        parse_manifest(bytes(200_000_000))
    assert time.monotonic() - started < 2


def test_deep_nesting_is_refused_with_little_stack_left() -> None:
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(200)
    try:
        with pytest.raises(ManifestInvalid, match="nested"):
            parse_manifest(b'{"format": ' + b"[" * 90 + b"]" * 90 + b"}")
    finally:
        sys.setrecursionlimit(limit)


def test_a_million_rows_or_containers_are_refused() -> None:
    with pytest.raises(ManifestInvalid):
        parse_manifest(b"[" + b"[]," * 1_100_000 + b"[]]")
    row = json.dumps({"path": "a", "size": 0, "sha256": "", "role": "doc"}, separators=(",", ":")).encode()
    with pytest.raises(ManifestInvalid):
        parse_manifest(GOOD.replace(b'"files":[', b'"files":[' + (row + b",") * 100_001))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("files", 0, "size"), -1),
        (("files", 0, "size"), "3"),
        (("files", 0, "size"), 3.5),
        (("files", 0, "size"), True),
        (("files", 0, "size"), 2**53),
        (("files", 0, "sha256"), "0" * 63),
        (("files", 0, "sha256"), "A" * 64),
        (("files", 0, "sha256"), "0" * 64 + "\n"),
        (("files", 0, "role"), "code"),
        (("files", 0, "role"), "native"),
        (("files", 0, "path"), "other.json"),
        (("files", 0, "path"), "manifest.json"),
        (("format", "major"), "1"),
        (("format", "major"), True),
        (("format", "name"), "zip"),
        (("requires", "os"), "a\u009bb"),
        (("requires", "packages"), {"../../etc": ">=1"}),
        (("requires", "packages"), {"--index-url": ""}),
        (("requires", "packages"), {"numpy": ">=1; rm -rf /"}),
        (("requires", "packages"), {"numpy": "@ https://evil.example/x.whl"}),
        (("runtime", "gpus"), {"cuda": {"packages": {"../../etc": ">=1"}}}),
        (("pipeline", "class_name"), "Flux\u202eenilepiP"),
        (("requires", "os"), "a\nb"),
        (("requires", "torch"), "x" * 5000),
        (("passes", 0, "name"), ""),
        (("engines", 0, "inputs", 0, "dtype"), "Float 32"),
        (("engines", 0, "inputs", 0, "shape"), [1]),
        (("engines", 0, "inputs", 0, "shape"), [2**40, 2**40]),
        (("engines", 0, "inputs", 0, "shape"), [-1, 16]),
        (("engines", 0, "inputs", 0, "stride"), [2**53 - 1, 2**53]),
        (("weights",), {"vae": [{"name": "0", "file": "absent", "tensors": 1, "bytes": 1}]}),
        (("files",), None),
        (("runtime", "targets"), 3),
        (("runtime", "targets"), ["cpu"]),
        (("runtime", "targets"), {"cpu": 3}),
        (("runtime", "device"), "tpu"),
        (("runtime", "device"), []),
        (("runtime", "offload"), "group"),
        (("runtime", "tf32"), 1),
        (("runtime", "gpus"), ["sm_89"]),
        (("runtime", "gpus"), {"nvidia-l4": "sm_89"}),
        (("runtime", "gpus"), {"nvidia-l4": {"sm": 89}}),
    ],
)
def test_refuses_a_field_that_is_out_of_bounds(path: tuple[str | int, ...], value: Any) -> None:
    with pytest.raises(ManifestInvalid) as caught:
        parse_manifest(changed(*path, to=value))
    assert str(caught.value)


def test_the_error_gives_the_json_path() -> None:
    with pytest.raises(ManifestInvalid) as caught:
        parse_manifest(changed("files", 0, "size", to="3"))
    assert [problem.where for problem in caught.value.problems] == ["$.files[0].size"]


def test_a_zero_does_not_hide_an_overflow() -> None:
    with pytest.raises(ValidationError, match="overflows"):
        TensorSpec(dtype="int8", shape=(2**40, 2**40, 0), stride=(1, 1, 1))
    with pytest.raises(ValidationError, match="offset overflows"):
        TensorSpec(dtype="int8", shape=(2**20, 2), stride=(2**50, 1))


@pytest.mark.parametrize("path", ["../x", "/x", "C:\\x", "a\\..\\b", "a\0b", "x" * 300])
def test_refuses_a_path_that_escapes(path: str) -> None:
    for place in (("files", 0, "path"), ("engines", 0, "path"), ("pipeline", "variants", 0, "programs", "call")):
        with pytest.raises(PathEscape):
            parse_manifest(changed(*place, to=path))


def test_refuses_names_that_collide() -> None:
    rows = json.loads(GOOD)["files"]
    with pytest.raises(PathEscape):
        parse_manifest(changed("files", to=[*rows, rows[0] | {"path": "programs/V0.json"}]))


def test_a_newer_major_is_incompatible_even_if_all_else_differs() -> None:
    with pytest.raises(Incompatible, match="found major 2"):
        parse_manifest(b'{"format": {"name": "diffkiln-bundle", "major": 2, "minor": 0}}')


def test_an_unknown_required_feature_is_incompatible() -> None:
    with pytest.raises(Incompatible, match="found 'streams'"):
        parse_manifest(changed("features_required", to=["streams"]))


def test_a_later_minor_with_unknown_fields_still_loads() -> None:
    raw = json.loads(GOOD)
    raw["format"]["minor"] = 7
    raw["later"] = raw["files"][0]["later"] = 1
    assert parse_manifest(json.dumps(raw).encode()) == manifest_of((ROW,)).model_copy(
        update={"format": Manifest.model_fields["format"].default.model_copy(update={"minor": 7})}
    )


def _survives(data: bytes) -> None:
    try:
        parse_manifest(data)
    except DiffkilnError as error:
        str(error)


@given(st.binary(max_size=400))
def test_only_our_errors_escape_from_any_bytes(data: bytes) -> None:
    _survives(data)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=50)
@given(st.data())
def test_only_our_errors_escape_from_a_manifest_with_a_strange_part(data: st.DataObject) -> None:
    raw = json.loads(GOOD)
    where: Any = raw
    while isinstance(where, dict | list) and where:
        key = data.draw(st.sampled_from(sorted(where)) if isinstance(where, dict) else st.integers(0, len(where) - 1))
        if not isinstance(where[key], dict | list) or data.draw(st.booleans()):
            where[key] = data.draw(JSON)
            break
        where = where[key]
    _survives(json.dumps(raw).encode())


@given(st.integers(0, len(GOOD) - 1), st.binary(max_size=3), st.integers(0, 3))
def test_only_our_errors_escape_from_a_damaged_manifest(place: int, put: bytes, removed: int) -> None:
    _survives(GOOD[:place] + put + GOOD[place + removed :])
