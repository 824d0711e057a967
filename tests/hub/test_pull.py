"""Fetching: one commit, what is wanted of it, whole or not at all, whatever the network and the repository do."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from diffkiln.bundle import MANIFEST, MANIFEST_DIGEST, PARTIAL, has_receipt, open_bundle
from diffkiln.errors import (
    BuildError,
    DiffkilnError,
    DigestMismatch,
    HubError,
    HubUnavailable,
    Incompatible,
    Incomplete,
    IntegrityError,
    OutputBusy,
    PathEscape,
    SpecError,
)
from diffkiln.hub import only, pull
from tests.bundle import making
from tests.hub.conftest import REPO, V3, V4, contents
from tests.hub.server import READER, Fault, Server

STAGING = ".bundle.pull"


def left_beside(output: Path) -> list[str]:
    return sorted(entry.name for entry in output.parent.iterdir() if entry != output)


def test_pulled_bundle_is_the_published_one(hub: Server, bundle: Path, published: str, output: Path) -> None:
    pulled = pull(REPO, output)
    assert contents(output) == contents(bundle)
    assert pulled.commit == published
    assert pulled.targets == (V3, V4)
    assert left_beside(output) == []
    assert not has_receipt(pulled.id)
    assert hub.tokens_elsewhere == []
    with open_bundle(output, expect_id=pulled.id) as opened:
        assert opened.whole
        opened.verify().close()


def test_engines_for_other_targets_are_not_asked_for(hub: Server, bundle: Path, published: str, output: Path) -> None:
    pulled = pull(REPO, output, choose=only([V3]))
    assert hub.asked_for(f"engines/{V3}/")
    assert hub.asked_for(f"engines/{V4}/") == []
    with open_bundle(bundle) as whole, open_bundle(output, expect_id=whole.id) as opened:
        assert opened.targets == pulled.targets == (V3,)
        opened.verify().close()
    assert contents(bundle).keys() - contents(output).keys() == {f"engines/{V4}/transformer/Block/model.so"}
    assert contents(output).keys() - contents(bundle).keys() == {PARTIAL}


def test_other_targets_can_be_fetched_later(hub: Server, bundle: Path, published: str, output: Path) -> None:
    pull(REPO, output, choose=lambda _: ())
    with pytest.raises(SpecError, match="--force"):
        pull(REPO, output)
    pull(REPO, output, force=True)
    assert contents(output) == contents(bundle)


def test_unknown_target_is_refused_and_the_known_are_listed(hub: Server, published: str, output: Path) -> None:
    with pytest.raises(HubError, match=f"'h100'.*{V3}, {V4}"):
        pull(REPO, output, choose=only([V3, "h100"]))
    assert not output.exists()


def test_what_the_manifest_does_not_name_is_never_asked_for(hub: Server, bundle: Path, output: Path) -> None:
    hub.publish(REPO, contents(bundle) | {"evil.py": b"import os", "engines/x.so": b"x", ".gitattributes": b""})
    pull(REPO, output)
    assert contents(output) == contents(bundle)
    assert hub.asked_for("evil") == hub.asked_for("engines/x.so") == []


def test_branch_that_moves_during_a_pull_is_not_followed(
    hub: Server, bundle: Path, published: str, output: Path, tmp_path: Path
) -> None:
    making.make_for(tmp_path / "next", (V3, V4), extra=b"later")

    def move(asked: str) -> None:
        if "/resolve/" in asked:
            hub.hooks.clear()
            hub.publish(REPO, contents(tmp_path / "next"))

    hub.hooks.append(move)
    assert pull(REPO, output).commit == published
    assert hub.repositories[REPO].head != published
    assert contents(output) == contents(bundle)
    assert pull(REPO, output, force=True).commit != published
    assert contents(output) == contents(tmp_path / "next")


def test_connection_that_breaks_halfway_is_taken_up_again(
    hub: Server, bundle: Path, published: str, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1000)
    hub.faults.append(Fault("GET /cdn/", cut=5000, times=1))
    pull(REPO, output)
    assert contents(output) == contents(bundle)
    assert "bytes=5000-" in hub.ranges


def test_pull_after_one_that_failed_fetches_only_the_rest(
    hub: Server, bundle: Path, published: str, output: Path
) -> None:
    fault = Fault("GET /cdn/", cut=0)
    hub.faults.append(fault)
    with pytest.raises(HubUnavailable, match="the transferred files are kept"):
        pull(REPO, output)
    assert left_beside(output) == [STAGING]
    assert not output.exists()
    fault.times = 0
    there = {name for name in contents(output.parent / STAGING / "bundle") if not name.startswith(".cache")}
    assert MANIFEST in there
    hub.requests.clear()
    pull(REPO, output)
    asked = {request.partition(f"/resolve/{published}/")[2] for request in hub.asked_for("/resolve/")}
    assert asked == contents(bundle).keys() - there
    assert contents(output) == contents(bundle)
    assert left_beside(output) == []


def test_file_that_changes_between_listing_and_download_is_found(
    hub: Server, bundle: Path, published: str, output: Path
) -> None:
    size = len((bundle / making.WEIGHTS).read_bytes())
    fault = Fault("/cdn/", data=bytes(size))
    hub.faults.append(fault)
    with pytest.raises(DigestMismatch, match="at the Hub or on the way"):
        pull(REPO, output)
    assert not output.exists()
    fault.times = 0
    pull(REPO, output)
    assert contents(output) == contents(bundle)


def test_more_than_was_agreed_is_not_taken(hub: Server, bundle: Path, published: str, output: Path) -> None:
    hub.faults.append(Fault("/cdn/", data=bytes(1 << 20)))
    with pytest.raises(IntegrityError, match="sends more"):
        pull(REPO, output)
    assert not output.exists()
    assert making.WEIGHTS not in contents(output.parent / STAGING / "bundle")


def test_repository_that_is_not_what_its_manifest_says_is_refused_unread(
    hub: Server, bundle: Path, output: Path
) -> None:
    files = contents(bundle)
    wrong: list[tuple[dict[str, bytes], type[DiffkilnError]]] = [
        (files | {making.WEIGHTS: b"short"}, DigestMismatch),
        (files | {making.WEIGHTS: bytes(len(files[making.WEIGHTS]))}, DigestMismatch),
        ({name: data for name, data in files.items() if name != making.PROGRAM}, Incomplete),
        (files | {MANIFEST_DIGEST: b"00  manifest.json\n"}, DigestMismatch),
        (files | {MANIFEST_DIGEST: bytes(2000)}, HubError),
        (files | {MANIFEST: bytes(17 << 20)}, HubError),
        ({"README.md": b"a model of another kind"}, HubError),
    ]
    for held, kind in wrong:
        hub.publish(REPO, held)
        hub.requests.clear()
        with pytest.raises(kind):
            pull(REPO, output)
        assert hub.asked_for("weights/") == hub.asked_for("/cdn/") == []
        assert not output.exists()


@pytest.mark.parametrize(
    "name",
    ["../x", "/etc/x", "a/../../x", "a\\..\\x", ".cache/huggingface/x", ".git/config", "pipeline/.git/config", "x.py"],
)
def test_hostile_names_in_a_manifest_are_refused(hub: Server, bundle: Path, output: Path, name: str) -> None:
    files = contents(bundle)
    manifest = json.loads(files[MANIFEST])
    manifest["files"].append({"path": name, "size": 4, "sha256": hashlib.sha256(b"evil").hexdigest(), "role": "doc"})
    data = json.dumps(manifest).encode()
    line = f"{hashlib.sha256(data).hexdigest()}  manifest.json\n".encode()
    hub.publish(REPO, files | {MANIFEST: data, MANIFEST_DIGEST: line, name: b"evil"})
    with pytest.raises((PathEscape, IntegrityError)):
        pull(REPO, output)
    assert not output.exists()
    assert hub.asked_for("weights/") == hub.asked_for("/cdn/") == []
    assert not list(output.parent.rglob(name.rpartition("/")[2]))


def test_what_another_commit_left_in_the_staging_is_removed(
    hub: Server, bundle: Path, published: str, output: Path
) -> None:
    stale = output.parent / STAGING / "bundle" / "weights" / "old.safetensors"
    stale.parent.mkdir(parents=True)
    (output.parent / STAGING).chmod(0o700)
    stale.write_bytes(b"of another commit")
    pull(REPO, output)
    assert contents(output) == contents(bundle)


def test_staging_that_others_can_write_to_is_refused(hub: Server, published: str, output: Path) -> None:
    (output.parent / STAGING).mkdir(mode=0o777)
    (output.parent / STAGING).chmod(0o777)
    with pytest.raises(PathEscape, match="Remove it"):
        pull(REPO, output)
    assert hub.asked_for("/resolve/") == []


def test_output_that_exists_is_kept_and_nothing_is_asked(hub: Server, published: str, output: Path) -> None:
    output.mkdir()
    (output / "mine").write_text("mine")
    for force in (False, True):
        with pytest.raises(SpecError):
            pull(REPO, output, force=force)
    assert (output / "mine").read_text() == "mine"
    assert hub.requests == []


def test_output_that_another_process_writes_is_busy(hub: Server, published: str, output: Path) -> None:
    from diffkiln.bundle.output import lock_output

    with lock_output(output), pytest.raises(OutputBusy):
        pull(REPO, output)


def test_full_disk_is_said_before_anything_large_is_fetched(
    hub: Server, published: str, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffkiln.hub.fetch.free_bytes", lambda _: 100)
    with pytest.raises(BuildError, match="100 are free"):
        pull(REPO, output)
    assert hub.asked_for("weights/") == []


def test_bundle_that_fits_no_target_is_not_fetched(hub: Server, published: str, output: Path) -> None:
    def none(_: object) -> tuple[str, ...]:
        raise Incompatible("no target")

    with pytest.raises(Incompatible):
        pull(REPO, output, choose=none)
    assert hub.asked_for("weights/") == []


def test_private_and_missing_repositories_say_how_to_log_in(
    hub: Server, bundle: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.publish(REPO, contents(bundle), private=True)
    monkeypatch.delenv("HF_TOKEN")
    for repo in (REPO, "me/nothing"):
        with pytest.raises(HubError, match=r"private and no token was given.*hf auth login"):
            pull(repo, output)
    monkeypatch.setenv("HF_TOKEN", READER)
    with pytest.raises(HubError, match="the token that was given may not see it"):
        pull("me/nothing", output)
    assert pull(REPO, output).path == output


def test_gated_repository_says_to_accept_its_terms(
    hub: Server, bundle: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.publish(REPO, contents(bundle), gated=True)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match=r"Accept its terms at https://huggingface\.co/me/small"):
        pull(REPO, output)


def test_unknown_revision_is_said(hub: Server, published: str, output: Path) -> None:
    for revision in ("v9", "ab" * 20):
        with pytest.raises(HubError, match="it lacks this revision"):
            pull(REPO, output, revision=revision)


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("match", ["/api/models/", "HEAD /me/small/resolve", "GET /cdn/"])
def test_trouble_that_stays_can_be_told_from_a_refusal(
    hub: Server, published: str, output: Path, status: int, match: str
) -> None:
    hub.faults.append(Fault(match, status))
    with pytest.raises(HubUnavailable, match=f"status {status}"):
        pull(REPO, output)
    assert not output.exists()


def test_server_that_is_gone_is_said(hub: Server, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubUnavailable, match="the connection failed"):
        pull(REPO, output)


def test_offline_mode_is_obeyed(hub: Server, published: str, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(HubUnavailable, match="HF_HUB_OFFLINE is set"):
        pull(REPO, output)
    assert hub.requests == []
