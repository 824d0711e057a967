"""Publishing: one commit with what changed and the card, or a reason why not and nothing changed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml

from diffkiln.bundle import PARTIAL, dump_partial, open_bundle
from diffkiln.errors import DigestMismatch, HubError, HubUnavailable, Incomplete
from diffkiln.hub import push
from tests.bundle import making
from tests.hub.conftest import REPO, UPLOAD_WARNING, V3, V4, contents
from tests.hub.server import READER, Fault, Server

pytestmark = pytest.mark.filterwarnings(UPLOAD_WARNING)


def test_repository_is_made_and_holds_the_bundle_and_its_card(hub: Server, bundle: Path) -> None:
    pushed = push(bundle, REPO)
    files = dict(hub.repositories[REPO].files)
    text = files.pop("README.md").decode()
    del files[".gitattributes"]
    assert files == contents(bundle)
    metadata = yaml.safe_load(text.split("---\n")[1])
    assert metadata["library_name"] == "diffkiln"
    assert metadata["tags"] == ["diffkiln", "compiled", V3, V4]
    assert f"diffkiln pull {REPO} -o bundle" in text
    with open_bundle(bundle) as opened:
        assert pushed.id == opened.id
        assert opened.id in text
    assert pushed.commit == hub.repositories[REPO].head
    assert pushed.commit in pushed.url
    assert hub.repositories[REPO].messages[1:] == ["FluxPipeline, compiled by diffkiln 0.1.0"]
    assert len(hub.asked_for("PUT /lfs/")) == 1  # the weights; the rest is small
    assert not hub.repositories[REPO].private


def test_second_push_sends_nothing_and_makes_no_commit(hub: Server, bundle: Path) -> None:
    first = push(bundle, REPO)
    hub.requests.clear()
    second = push(bundle, REPO)
    assert second.commit == first.commit
    assert second.sent == second.removed == ()
    assert hub.asked_for("POST") == hub.asked_for("PUT") == []


def test_only_what_changed_is_sent_and_what_is_gone_is_removed(hub: Server, bundle: Path, tmp_path: Path) -> None:
    push(bundle, REPO)
    making.make_for(tmp_path / "next", (V3,))
    hub.requests.clear()
    pushed = push(tmp_path / "next", REPO)
    assert pushed.sent == ("README.md", "manifest.json", "manifest.sha256")
    assert pushed.removed == (f"engines/{V4}/transformer/Block/model.so",)
    assert hub.asked_for("PUT") == []
    assert len(hub.asked_for("/commit/")) == 1
    files = hub.repositories[REPO].files
    assert files.keys() - contents(tmp_path / "next").keys() == {".gitattributes", "README.md"}


def test_large_files_are_sent_from_the_disk(hub: Server, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffkiln.hub.publish._SMALL", 1000)
    push(bundle, REPO)
    assert hub.repositories[REPO].files[making.WEIGHTS] == (bundle / making.WEIGHTS).read_bytes()
    assert push(bundle, REPO).sent == ()


def test_bundle_that_is_not_whole_is_refused_before_anything_is_asked(hub: Server, bundle: Path) -> None:
    (bundle / making.PROGRAM).write_bytes(b'{"ops": {}}')
    with pytest.raises(DigestMismatch):
        push(bundle, REPO)
    (bundle / making.PROGRAM).unlink()
    with pytest.raises(Incomplete):
        push(bundle, REPO)
    assert hub.requests == []


def test_partial_bundle_is_refused(hub: Server, bundle: Path) -> None:
    shutil.rmtree(bundle / "engines" / V4)
    (bundle / PARTIAL).write_bytes(dump_partial([V3]))
    with pytest.raises(Incomplete, match="--all-targets"):
        push(bundle, REPO)
    assert hub.requests == []


def test_file_that_changes_while_it_is_sent_is_not_published(
    hub: Server, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffkiln.hub.publish._SMALL", 1000)

    def change(asked: str) -> None:
        if "/preupload/" in asked:
            (bundle / making.WEIGHTS).write_bytes(bytes(16384))

    hub.hooks.append(change)
    with pytest.raises(DigestMismatch, match="changed while it was being pushed"):
        push(bundle, REPO)
    assert hub.asked_for("/commit/") == []


def test_manifest_that_changes_while_it_is_sent_is_not_published(hub: Server, bundle: Path) -> None:
    def change(asked: str) -> None:
        if asked == "GET /api/models/me/small":
            (bundle / "manifest.json").write_bytes(b"{}")

    hub.hooks.append(change)
    with pytest.raises(DigestMismatch, match=r"manifest\.json"):
        push(bundle, REPO)
    assert hub.asked_for("/commit/") == []


def test_repository_that_changes_meanwhile_is_left_as_it_is(hub: Server, bundle: Path) -> None:
    hub.publish(REPO, {"notes.txt": b"mine"})

    def overtake(asked: str) -> None:
        if "/preupload/" in asked:
            hub.publish(REPO, {"notes.txt": b"mine, later"})

    hub.hooks.append(overtake)
    with pytest.raises(HubError, match="changed by someone else"):
        push(bundle, REPO)
    assert hub.repositories[REPO].files == {"notes.txt": b"mine, later"}


def test_private_repository_is_made_and_a_public_one_refused(hub: Server, bundle: Path) -> None:
    push(bundle, REPO, private=True)
    assert hub.repositories[REPO].private
    hub.publish("me/open", {})
    with pytest.raises(HubError, match="is public"):
        push(bundle, "me/open", private=True)
    assert hub.repositories["me/open"].files == {}


@pytest.mark.parametrize(("token", "words"), [(READER, "to write, for a push"), ("", "hf auth login")])
def test_push_without_the_right_says_how_to_get_it(
    hub: Server, bundle: Path, monkeypatch: pytest.MonkeyPatch, token: str, words: str
) -> None:
    hub.publish(REPO, {})
    monkeypatch.setenv("HF_TOKEN", token)
    for repo in (REPO, "me/new"):
        with pytest.raises(HubError, match=words):
            push(bundle, repo)
    assert hub.repositories[REPO].files == {}


def test_trouble_that_passes_is_waited_for(hub: Server, bundle: Path) -> None:
    hub.faults += [Fault("POST /api/models/me/small/preupload", 503, times=2), Fault("PUT /lfs/", 500, times=1)]
    hub.faults.append(Fault("objects/batch", 429, times=1, headers={"Retry-After": "0"}))
    push(bundle, REPO)
    assert hub.repositories[REPO].files.keys() > contents(bundle).keys()


@pytest.mark.parametrize("match", ["/preupload/", "objects/batch", "PUT /lfs/", "/commit/"])
def test_trouble_that_stays_is_said_and_nothing_is_published(hub: Server, bundle: Path, match: str) -> None:
    hub.faults.append(Fault(match, 503))
    with pytest.raises(HubUnavailable, match="status 503"):
        push(bundle, REPO)
    assert hub.repositories[REPO].files.keys() == {".gitattributes"}


@pytest.mark.parametrize("repo", ["small", "a/b/c", "../x", "me/..", "me/a--b", "me/", "me/x.", "me/ö", "a b/c"])
def test_names_that_no_repository_can_have_are_refused(bundle: Path, repo: str) -> None:
    with pytest.raises(HubError, match="owner/name"):
        push(bundle, repo)
