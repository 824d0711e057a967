"""Tokens stay where they are: not in a message, a log, a traceback, a card, a manifest, or on another host."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Iterator
from pathlib import Path

import pytest

from diffkiln.errors import HubError, HubUnavailable
from diffkiln.hub import pull, push
from diffkiln.hub.explained import redacted
from tests.hub.conftest import REPO, UPLOAD_WARNING, contents
from tests.hub.server import READER, WRITER, Fault, Server

pytestmark = pytest.mark.filterwarnings(UPLOAD_WARNING)


@pytest.fixture(autouse=True)
def talkative(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Everything that can be logged is."""
    caplog.set_level(logging.DEBUG)
    logger = logging.getLogger("huggingface_hub")
    before = logger.level
    logger.setLevel(logging.DEBUG)
    yield
    logger.setLevel(before)


def test_push_and_pull_tell_no_one(
    hub: Server, bundle: Path, output: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    push(bundle, REPO)
    pull(REPO, output)
    captured = capfd.readouterr()
    written = b"".join((*contents(output).values(), *hub.repositories[REPO].files.values()))
    assert WRITER not in caplog.text + captured.out + captured.err + "".join(hub.repositories[REPO].messages)
    assert WRITER.encode() not in written
    assert hub.tokens_elsewhere == []


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422, 503])
def test_server_that_repeats_the_token_is_not_quoted(
    hub: Server, bundle: Path, caplog: pytest.LogCaptureFixture, status: int
) -> None:
    hub.publish(REPO, {})
    hub.faults.append(Fault("/preupload/", status, headers={"X-Error-Message": f"not with the token {WRITER}"}))
    with pytest.raises(HubError) as caught:
        push(bundle, REPO)
    told = "".join(traceback.format_exception(caught.value))
    assert f"status {status}" in told
    # httpcore2's own trace of what came over the wire is left to whoever turns it on.
    logged = [record.getMessage() for record in caplog.records if not record.name.startswith("httpcore")]
    assert WRITER not in told + "".join(logged)


def test_reader_that_pushes_is_not_quoted(hub: Server, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.publish(REPO, {})
    monkeypatch.setenv("HF_TOKEN", READER)
    with pytest.raises(HubError, match="lacks the right") as caught:
        push(bundle, REPO)
    assert READER not in "".join(traceback.format_exception(caught.value))


def test_address_with_a_token_is_not_quoted(output: Path, hub: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://user:{WRITER}@127.0.0.1:9")
    with pytest.raises(HubUnavailable) as caught:
        pull(REPO, output)
    assert WRITER not in str(caught.value)


def test_tokens_and_signatures_are_taken_out_of_texts(hub: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "of-another-shape")
    text = f"Bearer {WRITER}, {READER} and of-another-shape at https://host/file?X-Amz-Signature=abc&x=1 end"
    assert redacted(text) == "…, … and … at https://host/file?… end"


def test_token_from_the_clients_own_file_is_known(hub: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("kept-in-a-file\n")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    assert redacted("no kept-in-a-file here") == "no … here"
