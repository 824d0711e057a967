"""`load("hf://…")`: a commit and nothing else, fetched once, and what the cache does for unlike machines."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import diffkiln
from diffkiln.bundle import open_bundle
from diffkiln.errors import HubError, HubUnavailable, Incompatible, IntegrityError, MissingDependency, NativeCodeRefused
from diffkiln.hub import cached, only, push
from diffkiln.runtime.targets import choose_target, fitting_targets
from diffkiln.spec.targets import CPU_FLAGS
from tests.bundle import making
from tests.hub.conftest import REPO, UPLOAD_WARNING, V3, V4, contents
from tests.hub.server import Server

pytestmark = pytest.mark.filterwarnings(UPLOAD_WARNING)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("DIFFKILN_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
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


def test_cache_that_another_user_could_fill_is_refused_without_a_request(
    hub: Server, published: str, cache: Path
) -> None:
    place = cached(f"hf://{REPO}@{published}", only([V3]))
    hub.requests.clear()
    cache.chmod(0o777)
    with pytest.raises(IntegrityError, match="open to other users"):
        diffkiln.load(f"hf://{REPO}@{published}")
    cache.chmod(0o700)
    if os.geteuid() == 0:
        os.chown(cache, 65533, 65533)
        with pytest.raises(IntegrityError, match="belongs to another user"):
            diffkiln.load(f"hf://{REPO}@{published}")
    assert hub.requests == []
    assert place.exists()


@pytest.mark.parametrize("umask", [0, 0o022])
def test_cache_is_private_whatever_the_umask(hub: Server, published: str, cache: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        cached(f"hf://{REPO}@{published}", only([V3]))
    finally:
        os.umask(before)
    assert cache.stat().st_mode & 0o777 == cache.parent.stat().st_mode & 0o777 == 0o700


@pytest.fixture
def planted(hub: Server, published: str, cache: Path, tmp_path: Path) -> Path:
    """Another bundle, whole and by its own digests, in the place of the one that was published."""
    place = cache / REPO / published
    place.parent.mkdir(parents=True)
    cache.parent.chmod(0o700)
    cache.chmod(0o700)
    making.make_for(tmp_path / "evil", (V3,), extra=b"of another user")
    return Path(shutil.copytree(tmp_path / "evil", place))


def test_bundle_that_was_planted_in_the_cache_is_replaced_by_the_hubs(
    hub: Server, bundle: Path, published: str, planted: Path, caplog: pytest.LogCaptureFixture
) -> None:
    address = f"hf://{REPO}@{published}"
    assert cached(address, only([V3])) == planted
    assert contents(cached(address, only([V3, V4]))) == contents(bundle)
    assert "differs from the Hub's bundle" in caplog.text
    hub.requests.clear()
    cached(address, only([V3]))
    assert hub.requests == []


def test_bundle_that_was_planted_over_a_fetched_one_is_replaced(
    hub: Server, bundle: Path, published: str, tmp_path: Path
) -> None:
    address = f"hf://{REPO}@{published}"
    place = cached(address, only([V3, V4]))
    shutil.rmtree(place)
    making.make_for(place, (V3,), extra=b"of another user")
    cached(address, only([V3]))
    assert contents(cached(address, only([V3, V4]))) == contents(bundle)


def test_planted_bundle_is_refused_where_the_hub_cannot_be_asked(
    hub: Server, published: str, planted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(HubUnavailable, match=r"nothing shows that you fetched it.*or by its path"):
        cached(f"hf://{REPO}@{published}", only([V3]))


def test_bundle_without_a_note_is_compared_with_the_hub_once(
    hub: Server, published: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As where the state directory was lost."""
    address = f"hf://{REPO}@{published}"
    cached(address, only([V3]))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "lost"))
    hub.requests.clear()
    cached(address, only([V3]))
    assert len(hub.requests) == 1
    cached(address, only([V3]))
    assert len(hub.requests) == 1


def test_importing_diffkiln_imports_nothing_of_the_hub() -> None:
    code = "import sys, diffkiln, diffkiln.cli; sys.exit(bool({'huggingface_hub', 'diffkiln.hub'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ)


@pytest.mark.more
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_a_front_fetches_programs_and_a_replica_the_engines_of_its_machine(
    hub: Server, bundle: Path, published: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffkiln.serving import ray_processes

    address = f"hf://{REPO}@{published}"
    monkeypatch.setattr(ray_processes, "fitting_targets", lambda manifest, device: {"cpu": (V3,)}[device])
    place = ray_processes.fetched(address, "cpu", engines=False)
    assert open_bundle(place).targets == ()
    assert ray_processes.fetched(address, "cpu") == place
    assert open_bundle(place).targets == (V3,)
    assert ray_processes.fetched(str(bundle), "cpu") == str(bundle)
