"""`load("hf://…")`: a commit and nothing else, fetched once, and what the cache does for unlike machines."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import diffkiln
from diffkiln.bundle import open_bundle
from diffkiln.errors import HubError, HubUnavailable, Incompatible, MissingDependency, NativeCodeRefused
from diffkiln.hub import cached, only, push
from diffkiln.runtime.targets import choose_target, fitting_targets
from diffkiln.spec.targets import CPU_FLAGS
from tests.hub.conftest import REPO, UPLOAD_WARNING, V3, V4, contents
from tests.hub.server import Server

pytestmark = pytest.mark.filterwarnings(UPLOAD_WARNING)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("DIFFKILN_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "diffkiln" / "bundles"


@pytest.mark.parametrize("revision", ["", "@", "@main", "@v1", "@abcdef1", "@" + "AB" * 20])
def test_what_is_no_commit_is_refused_and_the_mend_shows_where_commits_are(hub: Server, revision: str) -> None:
    with pytest.raises(HubError, match=rf"40 hexadecimal digits from https://huggingface\.co/{REPO}/commits/main"):
        diffkiln.load(f"hf://{REPO}{revision}")
    assert hub.requests == []


@pytest.mark.parametrize("name", ["", "small", "../../etc", "a/b/c", "me/..", "~/x"])
def test_names_that_no_repository_can_have_are_refused(hub: Server, cache: Path, name: str) -> None:
    with pytest.raises(HubError, match="owner/name"):
        diffkiln.load(f"hf://{name}@{'ab' * 20}")
    assert not cache.exists()


def test_second_use_asks_nothing(hub: Server, bundle: Path, published: str, cache: Path) -> None:
    place = cached(f"hf://{REPO}@{published}", only([V3]))
    assert place == cache / REPO / published
    assert contents(place).keys() <= contents(bundle).keys() | {"partial.json"}
    hub.requests.clear()
    assert cached(f"hf://{REPO}@{published}", only([V3])) == place
    assert hub.requests == []


def test_second_use_needs_no_huggingface_hub(
    hub: Server, published: str, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    place = cached(f"hf://{REPO}@{published}", only([V3]))
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert cached(f"hf://{REPO}@{published}", only([V3])) == place
    with pytest.raises(MissingDependency, match=r"diffkiln\[hub\]"):
        cached(f"hf://{REPO}@{'ab' * 20}", only([V3]))


def test_another_machine_that_shares_the_cache_adds_its_engines(
    hub: Server, bundle: Path, published: str, cache: Path
) -> None:
    address = f"hf://{REPO}@{published}"
    cached(address, only([V3]))
    assert contents(cached(address, only([V4]))) == contents(bundle)


def test_offline_the_cache_serves_and_the_rest_is_an_error(
    hub: Server, published: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached(f"hf://{REPO}@{published}", only([V3]))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    cached(f"hf://{REPO}@{published}", only([V3]))
    with pytest.raises(HubUnavailable, match="HF_HUB_OFFLINE"):
        cached(f"hf://{REPO}@{published}", only([V4]))


def test_engines_that_were_left_out_are_said_to_be(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr("diffkiln.runtime.targets.check_target", lambda *_, **__: None)
    monkeypatch.setattr("diffkiln.runtime.compatibility._cpu_flags", lambda: CPU_FLAGS["x86-64-v4"])
    with open_bundle(bundle) as opened:
        assert fitting_targets(opened.manifest) == (V4,)
        assert choose_target(opened.manifest, torch.device("cpu"), [V3]) == V3
        with pytest.raises(Incompatible, match="left out when the bundle was pulled"):
            choose_target(opened.manifest, torch.device("cpu"), [])
        eager = opened.manifest.model_copy(update={"runtime": opened.manifest.runtime | {"on_incompatible": "eager"}})
    monkeypatch.undo()
    assert fitting_targets(eager, "meta") == ()


def test_compiled_bundle_goes_up_and_is_loaded_and_drawn_with(
    hub: Server, digits_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    pushed = push(digits_bundle, REPO)
    address = f"hf://{REPO}@{pushed.commit}"
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "of another user"))
    with pytest.raises(NativeCodeRefused, match="--allow-native"):
        diffkiln.load(address)
    hub.requests.clear()

    def draw(path: str | Path) -> bytes:
        pipe = diffkiln.load(path, allow_native=True)
        return pipe("a handwritten seven", generator=torch.Generator("cpu").manual_seed(7)).images[0].tobytes()

    assert draw(address) == draw(digits_bundle)
    assert hub.requests == []


def test_importing_diffkiln_imports_nothing_of_the_hub() -> None:
    code = "import sys, diffkiln, diffkiln.cli; sys.exit(bool({'huggingface_hub', 'diffkiln.hub'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ)
