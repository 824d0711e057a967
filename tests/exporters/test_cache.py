from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from diffkiln.bundle.manifest import TensorSpec
from diffkiln.bundle.state import cache_root
from diffkiln.errors import ExportError, IntegrityError
from diffkiln.exporters.artefact import Artefact, Lowering
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


@pytest.mark.parametrize("umask", [0, 0o022])
def test_the_cache_is_private_whatever_the_umask(tmp_path: Path, artefact: Artefact, umask: int) -> None:
    cache = EngineCache(tmp_path / "home" / "cache")
    before = os.umask(umask)
    try:
        entry = cache.put(KEY, artefact).directory.parent
        toolchain = cache.toolchain
    finally:
        os.umask(before)
    for directory in (cache.root.parent, cache.root, entry.parent, toolchain):
        assert directory.stat().st_mode & 0o777 == 0o700


def another_users(directory: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a directory to another user")
    os.chown(directory, 65533, 65533)


@pytest.mark.parametrize("where", ["", "engines"])
@pytest.mark.parametrize("change", [another_users, lambda path: path.chmod(0o777)], ids=["owner", "mode"])
def test_engines_that_another_user_could_have_put_there_are_refused(
    cache: EngineCache, artefact: Artefact, where: str, change: Callable[[Path], object]
) -> None:
    cache.put(KEY, artefact)
    change(cache.root / where)
    for call in (lambda: cache.get(KEY), lambda: cache.put(KEY, artefact)):
        with pytest.raises(IntegrityError, match=r"DIFFKILN_CACHE_DIR|chmod 700"):
            call()


def test_toolchain_that_another_user_could_have_filled_is_refused(cache: EngineCache) -> None:
    cache.toolchain.chmod(0o777)
    with pytest.raises(IntegrityError, match="open to other users"):
        cache.toolchain  # noqa: B018


def test_what_a_killed_build_left_is_removed(
    cache: EngineCache, artefact: Artefact, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = cache.put(KEY, artefact)
    (stored.directory.parent.parent / "diffkiln-new-0123456789abcdef").mkdir()
    monkeypatch.setattr("diffkiln.bundle.scratch._swept", set())
    cache.put(KEY, artefact)
    assert [entry.name for entry in stored.directory.parent.parent.iterdir()] == [KEY]


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
