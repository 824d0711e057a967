from __future__ import annotations

import json
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from diffkiln.bundle.manifest import TensorSpec
from diffkiln.bundle.state import cache_root
from diffkiln.errors import ExportError
from diffkiln.exporters.base import Artefact, Lowering
from diffkiln.exporters.cache import EngineCache, engine_key
from diffkiln.spec.targets import Target
from tests.exporters.regions import CPU, block, int8_linear

KEY = "a" * 64


@pytest.fixture
def artefact(tmp_path: Path) -> Artefact:
    directory = tmp_path / "made"
    (directory / "deep").mkdir(parents=True)
    (directory / "deep" / "engine.so").write_bytes(b"code")
    spec = TensorSpec(dtype="float32", shape=(2, 3), stride=(3, 1))
    return Artefact("aot_inductor", directory, (spec, spec), (spec,), {"level": 2}, {"glibc": "2.34"})


@pytest.fixture
def cache(tmp_path: Path) -> EngineCache:
    return EngineCache(tmp_path / "cache")


def test_gives_back_what_was_put(cache: EngineCache, artefact: Artefact) -> None:
    assert cache.get(KEY) is None
    stored = cache.put(KEY, artefact)
    assert cache.get(KEY) == stored
    assert replace(stored, directory=artefact.directory) == artefact
    assert (stored.directory / "deep" / "engine.so").read_bytes() == b"code"


@pytest.mark.parametrize("damage", ["changed", "removed", "added", "index", "index gone"])
def test_takes_a_damaged_entry_for_absent_and_replaces_it(cache: EngineCache, artefact: Artefact, damage: str) -> None:
    stored = cache.put(KEY, artefact)
    library, index = stored.directory / "deep" / "engine.so", stored.directory.parent / "index.json"
    match damage:
        case "changed":
            library.write_bytes(b"Code")
        case "removed":
            library.unlink()
        case "added":
            library.with_name("more.so").write_bytes(b"")
        case "index":
            index.write_text(index.read_text().replace('"2.34"', '"2.35"'))
        case "index gone":
            index.unlink()
    assert cache.get(KEY) is None
    cache.put(KEY, artefact)
    assert cache.get(KEY) == stored
    assert [entry.name for entry in stored.directory.parent.parent.iterdir()] == [KEY]


def test_keeps_a_good_entry_when_another_is_put(cache: EngineCache, artefact: Artefact) -> None:
    stored = cache.put(KEY, artefact)
    before = (stored.directory.parent / "index.json").stat().st_ino
    cache.put(KEY, artefact)
    assert (stored.directory.parent / "index.json").stat().st_ino == before


def test_many_may_put_at_once(cache: EngineCache, artefact: Artefact) -> None:
    threads = [threading.Thread(target=cache.put, args=(KEY, artefact)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert cache.get(KEY) is not None
    assert len(list((cache.root / "engines").iterdir())) == 1


def test_says_where_it_cannot_write(tmp_path: Path, artefact: Artefact) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match="DIFFKILN_CACHE_DIR"):
        EngineCache(tmp_path / "file" / "cache").put(KEY, artefact)


def test_an_index_of_another_shape_is_no_entry(cache: EngineCache, artefact: Artefact) -> None:
    index = cache.put(KEY, artefact).directory.parent / "index.json"
    for text in ("", "[]", "null", json.dumps({"body": None, "sha256": 1})):
        index.write_text(text)
        assert cache.get(KEY) is None


def test_the_key_follows_everything_that_decides_the_engine() -> None:
    tools = {"torch": "2.13.0", "compiler": "g++ 12"}
    lowering = Lowering(block(), CPU)
    keys = {
        engine_key("aot_inductor", 1, lowering, tools),
        engine_key("aot_inductor", 2, lowering, tools),
        engine_key("other", 1, lowering, tools),
        engine_key("aot_inductor", 1, lowering, tools | {"torch": "2.14.0"}),
        engine_key("aot_inductor", 1, lowering, tools | {"compiler": "g++ 13"}),
        engine_key("aot_inductor", 1, Lowering(int8_linear(), CPU), tools),
        engine_key("aot_inductor", 1, Lowering(block(), CPU, options={"level": 1}), tools),
        engine_key("aot_inductor", 1, Lowering(block(), Target("old", "cpu", "x86-64-v2")), tools),
        engine_key("aot_inductor", 1, Lowering(block(), Target("l4", "cuda", compute_capability="8.9")), tools),
    }
    assert len(keys) == 9


def test_names_of_region_and_target_are_not_part_of_the_key() -> None:
    renamed = Lowering(replace(block(), name="Other"), replace(CPU, name="mine"))
    assert engine_key("b", 1, renamed, {}) == engine_key("b", 1, Lowering(block(), CPU), {})


def test_the_root_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DIFFKILN_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_root() == Path.home() / ".cache" / "diffkiln"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/is/ignored")
    assert cache_root() == Path.home() / ".cache" / "diffkiln"
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_root() == Path("/xdg/diffkiln")
    monkeypatch.setenv("DIFFKILN_CACHE_DIR", "/mine")
    assert cache_root() == EngineCache().root == Path("/mine")
