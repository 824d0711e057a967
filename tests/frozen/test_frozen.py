"""Bundles that earlier versions wrote load, are whole, and draw what they drew."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

import diffkiln
from diffkiln.bundle import FORMAT_MAJOR, FORMAT_MINOR, open_bundle, parse_manifest
from diffkiln.bundle.reader import digest_line
from diffkiln.bundle.versions import fits
from diffkiln.errors import Incompatible, NativeCodeRefused
from diffkiln.runtime import compatibility
from diffkiln.spec import parse_spec
from tests.frozen.kinds import KINDS, requests
from tests.frozen.make import PICTURE, drawn, drawn_by_diffusers
from tests.pipelines import WARNING_FILTERS

pytestmark = [pytest.mark.filterwarnings(text) for text in WARNING_FILTERS]
HERE = Path(__file__).parent
PLACES = sorted(path.parent for path in HERE.glob("*/*/bundle"))
ENGINES = [place for place in PLACES if place.name == "engine"]
#: The first of the plainest kind.
DATA = next(place for place in PLACES if place.name == "data")
#: Each bundle's id when it was frozen: one that was made again or edited has another.
IDS: dict[str, str] = json.loads((HERE / "ids.json").read_text())


def _name(place: Path) -> str:
    return place.relative_to(HERE).as_posix()


def _here(bundle: Path) -> bool:
    """Whether this is a torch for which the bundle's engines were built."""
    with open_bundle(bundle) as opened:
        return fits(torch.__version__.split("+")[0], opened.manifest.requires.torch)


def _calls(place: Path) -> list[dict[str, Any]]:
    return requests(place.name, json.loads((place / "spec.json").read_text()))


def _is_as_expected(place: Path, images: list[PICTURE]) -> None:
    files = sorted(place.glob("expected*.npy"))
    assert len(images) == len(files) > 0
    for image, file in zip(images, files, strict=True):
        expected = numpy.load(file).astype(image.dtype)
        assert image.shape == expected.shape
        # Half precision keeps 11 bits; kernels of another torch may add as much again.
        numpy.testing.assert_allclose(image, expected, atol=2e-3)


def test_every_version_has_every_kind_and_a_bundle_of_this_one_is_there():
    assert {_name(place) for place in PLACES} == set(IDS)
    versions = {place.parent for place in PLACES}
    for version in versions:
        assert {place.name for place in PLACES if place.parent == version} == set(KINDS)
    assert diffkiln.__version__.rpartition(".")[0] in {place.parent.name.rpartition(".")[0] for place in PLACES}


@pytest.mark.parametrize("place", PLACES, ids=_name)
def test_is_the_bundle_that_was_frozen_and_whole(place):
    with open_bundle(place / "bundle", expect_id=IDS[_name(place)]) as bundle, bundle.verify() as verified:
        assert bundle.whole
        assert any(row.role == "native" for row in verified.files) == (place.name == "engine")


@pytest.mark.parametrize("way", [drawn, drawn_by_diffusers], ids=["alone", "as_diffusers"])
@pytest.mark.parametrize("place", PLACES, ids=_name)
def test_draws_what_it_drew(place, way):
    bundle, calls, native = place / "bundle", _calls(place), place in ENGINES
    if native and not _here(bundle):
        with pytest.raises(Incompatible, match=r"torch: found .*, required =="):
            way(bundle, calls, allow_native=True)
        return
    _is_as_expected(place, way(bundle, calls, allow_native=native))


@pytest.mark.parametrize("place", ENGINES, ids=_name)
def test_engine_of_another_torch_is_refused_with_found_against_required(place, monkeypatch):
    monkeypatch.setattr(compatibility.torch, "__version__", "2.99.1+cpu")
    with pytest.raises(Incompatible, match=r"torch: found 2\.99\.1, required ==2\.\d+\.\*"):
        diffkiln.load(place / "bundle", allow_native=True)


@pytest.mark.parametrize("place", ENGINES, ids=_name)
def test_engine_that_nobody_here_built_needs_leave(place):
    with pytest.raises(NativeCodeRefused if _here(place / "bundle") else Incompatible):
        diffkiln.load(place / "bundle")


@pytest.mark.parametrize("place", PLACES, ids=_name)
def test_spec_that_it_was_compiled_from_is_still_read(place):
    spec = parse_spec(place / "spec.json")
    assert parse_spec(json.dumps(spec.as_json()).encode()) == spec
    assert [entry.name for entry in spec.passes] == [entry["name"] for entry in KINDS[place.name].spec["passes"]]


def _rewritten(output: Path, **fields: Any) -> Path:
    """The first data-only bundle under a manifest with other fields, and its digest."""
    shutil.copytree(DATA / "bundle", output)
    raw = json.loads((output / "manifest.json").read_bytes())
    data = json.dumps(raw | fields).encode()
    (output / "manifest.json").write_bytes(data)
    (output / "manifest.sha256").write_bytes(digest_line(data))
    return output


def test_bundle_of_a_later_minor_with_fields_that_nobody_knows_draws_the_same(tmp_path):
    later = _rewritten(
        tmp_path / "later",
        format={"name": "diffkiln-bundle", "major": FORMAT_MAJOR, "minor": FORMAT_MINOR + 7, "later": True},
        later={"streams": [1, 2]},
    )
    _is_as_expected(DATA, drawn(later, _calls(DATA)))


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"format": {"name": "diffkiln-bundle", "major": FORMAT_MAJOR + 1, "minor": 0}}, "found major 2"),
        ({"format": {"name": "diffkiln-bundle", "major": 0, "minor": 9}}, "found major 0"),
        ({"features_required": ["streams"]}, "found 'streams'"),
    ],
)
def test_bundle_of_another_major_or_with_an_unknown_feature_is_refused(tmp_path, fields, reason):
    with pytest.raises(Incompatible, match=reason):
        diffkiln.load(_rewritten(tmp_path / "other", **fields))


def test_bundle_of_no_minor_needs_a_field_that_it_does_not_have():
    """What a later minor adds to the manifest has a default, so that a bundle of an earlier one says the same."""
    for place in PLACES:
        data = (place / "bundle" / "manifest.json").read_bytes()
        manifest = parse_manifest(data)
        assert manifest.format.minor <= FORMAT_MINOR
        assert _within(json.loads(data), manifest.model_dump(mode="json"))


def _within(old: Any, new: Any) -> bool:
    """Whether `new` says all that `old` does, and perhaps more."""
    if isinstance(old, dict):
        return old.keys() <= new.keys() and all(_within(value, new[key]) for key, value in old.items())
    if isinstance(old, list):
        return len(old) == len(new) and all(map(_within, old, new))
    return old == new
