"""Bundles without the engines of some targets: what may be missing, and that nothing else may."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from diffkiln.bundle import PARTIAL, authorise_native, dump_partial, engine_targets, left_out, open_bundle
from diffkiln.errors import DigestMismatch, Incomplete, ManifestInvalid, UnexpectedFile
from tests.bundle import making

V3, V4 = "cpu-x86-64-v3", "cpu-x86-64-v4"


@pytest.fixture
def both(output: Path) -> Path:
    """A bundle with engines for two targets."""
    making.make_for(output, (V3, V4))
    return output


@pytest.fixture
def one(both: Path) -> Path:
    """The same, as it is pulled for the first target."""
    shutil.rmtree(both / "engines" / V4)
    (both / PARTIAL).write_bytes(dump_partial([V3]))
    return both


def test_whole_bundle_has_the_engines_of_every_target(both: Path) -> None:
    with open_bundle(both) as bundle:
        assert bundle.whole
        assert bundle.targets == engine_targets(bundle.manifest) == (V3, V4)
        bundle.verify().close()


def test_partial_bundle_keeps_its_id_and_verifies(both: Path, output: Path) -> None:
    with open_bundle(both) as bundle:
        whole = bundle.id
    shutil.rmtree(both / "engines" / V4)
    with open_bundle(both) as bundle, pytest.raises(Incomplete, match=V4):
        bundle.verify()
    (both / PARTIAL).write_bytes(dump_partial([V3]))
    with open_bundle(both, expect_id=whole) as bundle:
        assert not bundle.whole
        assert bundle.targets == (V3,)
        with bundle.verify() as verified:
            assert len(list(verified.native_copy(f"engines/{V3}/transformer/Block").iterdir())) == 1


def test_engine_that_was_left_out_is_not_handed_out(one: Path) -> None:
    with open_bundle(one) as bundle, bundle.verify() as verified:
        with pytest.raises(Incomplete, match="no native file"):
            verified.native_copy(f"engines/{V4}/transformer/Block")
        with pytest.raises(Incomplete, match="left out when the bundle was pulled"):
            verified.check(f"engines/{V4}/transformer/Block/model.so")


def test_nothing_but_engines_of_other_targets_may_be_missing(one: Path) -> None:
    for path in (making.PROGRAM, making.WEIGHTS, making.CONFIG, f"engines/{V3}/transformer/Block/model.so"):
        kept = (one / path).read_bytes()
        (one / path).unlink()
        with open_bundle(one) as bundle, pytest.raises(Incomplete, match=path):
            bundle.verify()
        (one / path).write_bytes(kept)
    open_bundle(one).verify().close()


def test_engine_that_is_said_to_be_left_out_may_not_be_there(one: Path) -> None:
    place = one / "engines" / V4 / "transformer" / "Block"
    place.mkdir(parents=True)
    (place / "model.so").write_bytes(b"whatever")
    with open_bundle(one) as bundle, pytest.raises(UnexpectedFile):
        bundle.verify()


def test_engine_that_is_there_is_hashed(one: Path) -> None:
    engine = one / "engines" / V3 / "transformer" / "Block" / "model.so"
    engine.write_bytes(bytes(len(engine.read_bytes())))
    with open_bundle(one) as bundle, pytest.raises(DigestMismatch):
        bundle.verify()


def test_without_any_engine_no_permit_for_native_code_is_needed(both: Path) -> None:
    shutil.rmtree(both / "engines")
    (both / PARTIAL).write_bytes(dump_partial([]))
    with open_bundle(both) as bundle, bundle.verify() as verified:
        assert "no native code" in authorise_native(verified).reason


def test_left_out_are_native_files_in_the_directory_of_an_engine_alone(both: Path) -> None:
    with open_bundle(both) as bundle:
        assert left_out(bundle.manifest, [V3]) == {f"engines/{V4}/transformer/Block/model.so"}
        assert left_out(bundle.manifest, [V3, V4]) == frozenset()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"{}",
        b'{"targets": "all"}',
        b'{"targets": [1]}',
        b'{"targets": [["a"]]}',
        b'{"targets": ["h100"]}',
        b"\xff",
    ],
)
def test_note_that_is_not_one_is_refused(both: Path, data: bytes) -> None:
    (both / PARTIAL).write_bytes(data)
    with pytest.raises(ManifestInvalid, match=PARTIAL):
        open_bundle(both)
