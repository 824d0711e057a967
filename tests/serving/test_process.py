"""`diffkiln serve` as a process: signals, logs, tokens, overload."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest

import diffkiln
from diffkiln.cli import main
from diffkiln.errors import CallError
from diffkiln.serving.settings import Settings, digests, read_tokens
from tests.serving.conftest import EDITS, GENERATIONS, Held, await_ready, running

TOKEN = "a-token-that-is-long-enough-8f2a"


@contextmanager
def process(bundle: Path, log: Path, *options: str, **environment: str) -> Iterator[tuple[subprocess.Popen, str]]:
    """`diffkiln serve` on a free port, and its address; it is killed where the block leaves it running."""
    command = [sys.executable, "-m", "diffkiln", "serve", str(bundle), "--port", "0", *options]
    with log.open("w") as out:
        started = subprocess.Popen(command, stderr=out, stdout=out, env={**os.environ, **environment})
    try:
        ends = time.monotonic() + 120
        while not (found := re.search(r"listening on (http://\S+)", log.read_text())):
            assert started.poll() is None, log.read_text()
            assert time.monotonic() < ends
            time.sleep(0.05)
        with httpx2.Client(base_url=found[1], trust_env=False) as client:
            await_ready(client)
        yield started, found[1]
    finally:
        started.kill()
        started.wait()


def eventually(holds: Callable[[], bool]) -> None:
    """Waits until something holds, for a minute at most."""
    ends = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < ends
        time.sleep(0.005)


def inside(client: httpx2.Client) -> float:
    """Images that wait or are drawn."""
    found = re.findall(r"^diffkiln_(?:queue|running)_images (\S+)", client.get("/metrics").text, re.MULTILINE)
    return sum(map(float, found))


def test_sigterm_lets_running_requests_end_and_takes_no_more(drawing, tmp_path):
    options = ("--queue", "512", "--images", "64")
    with process(drawing, tmp_path / "log", *options) as (started, url), ThreadPoolExecutor(4) as pool:
        with httpx2.Client(base_url=url, trust_env=False, timeout=120) as client:
            asked = [pool.submit(client.post, GENERATIONS, json={"prompt": "a seven", "n": 64}) for _ in range(4)]
            eventually(lambda: inside(client) > 3 * 64)  # all four have come
            started.send_signal(signal.SIGTERM)
            answers = [each.result() for each in asked]
        assert started.wait(30) == 0
    assert [answer.status_code for answer in answers] == [200] * 4
    assert all(len(answer.json()["data"]) == 64 for answer in answers)
    with pytest.raises(httpx2.ConnectError):
        httpx2.get(f"{url}/health", trust_env=False)


def test_ctrl_c_ends_the_server_with_130(drawing, tmp_path):
    with process(drawing, tmp_path / "log") as (started, _):
        started.send_signal(signal.SIGINT)
        assert started.wait(30) == 130


def test_tokens_guard_and_reach_no_log(drawing, tmp_path):
    tokens, log = tmp_path / "tokens", tmp_path / "log"
    tokens.write_text(f"# of the team\n{TOKEN}\n")
    tokens.chmod(0o600)
    wrong = TOKEN[:-1] + "b"
    options = ("--tokens", str(tokens), "--log-json", "--log-level", "debug")
    with process(drawing, log, *options, DIFFKILN_TOKEN=TOKEN[::-1]) as (started, url):
        with httpx2.Client(base_url=url, trust_env=False, timeout=60) as client:
            for given in ("", f"Bearer {wrong}", f"Basic {TOKEN}", "Bearer", f"Bearer {TOKEN}x"):
                headers = {"authorization": given} if given else {}
                refused = client.post(f"{GENERATIONS}?token={TOKEN}", json={"prompt": "a"}, headers=headers)
                assert (refused.status_code, refused.headers["www-authenticate"]) == (401, "Bearer")
                assert client.get("/metrics", headers=headers).status_code == 401
            for token in (TOKEN, TOKEN[::-1]):
                headers = {"authorization": f"Bearer {token}", "x-request-id": "mine"}
                assert client.post(GENERATIONS, json={"prompt": "a"}, headers=headers).status_code == 200
            assert client.post(GENERATIONS, content=b"{", headers=headers).status_code == 415
            for path in ("/", "/health", "/ready", "/openapi.json"):
                assert client.get(path).status_code == 200
        started.send_signal(signal.SIGTERM)
        assert started.wait(30) == 0
    text = log.read_text()
    for secret in (TOKEN, TOKEN[::-1], wrong):
        assert secret not in text
    lines = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    (drawn, _) = [line for line in lines if line.get("request") == "mine" and line["status"] == 200]
    assert drawn["message"] == f"POST {GENERATIONS}"
    assert {"time", "level", "logger", "seconds"} <= drawn.keys()
    assert all("request" in line for line in lines if line["message"].startswith("POST "))


def test_a_token_file_that_is_not_safe_is_refused(tmp_path):
    path = tmp_path / "tokens"
    path.write_text(TOKEN)
    path.chmod(0o644)
    with pytest.raises(CallError, match="other users may read it"):
        read_tokens(path)
    path.chmod(0o600)
    assert Settings(tokens=read_tokens(path)).admits(TOKEN)
    for text, words in (("# nothing\n", "there is no token"), ("short", "token 1 is shorter than 16")):
        path.write_text(text)
        with pytest.raises(CallError, match=words):
            read_tokens(path)
    with pytest.raises(CallError, match="cannot be read"):
        read_tokens(tmp_path / "missing")


def test_tokens_are_compared_whole_with_every_known_one(monkeypatch):
    import hmac

    compared = []
    real = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append((a, b)) or real(a, b))
    settings = Settings(tokens=digests([TOKEN, TOKEN * 2], "here"))
    assert settings.admits(TOKEN)
    assert not settings.admits("\udcff")
    assert len(compared) == 4
    assert {len(side) for pair in compared for side in pair} == {32}


@pytest.mark.parametrize("limits", [{"queue": 0}, {"deadline": -1.0}, {"window": -1.0}, {"queue": 2, "images": 8}])
def test_limits_that_cannot_be_are_refused(limits):
    with pytest.raises(CallError):
        Settings(**limits)


def test_what_cannot_be_served_is_said(tmp_path, capsys, drawing):
    assert main(["serve", str(tmp_path / "missing")]) == 6
    assert main(["serve", str(drawing), "--tokens", str(tmp_path / "missing")]) == 2
    assert "token file" in capsys.readouterr().err


def test_a_missing_extra_is_named(monkeypatch, capsys, drawing):
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None if name == "uvicorn" else real(name))
    assert main(["serve", str(drawing)]) == 5
    assert "serving needs uvicorn: pip install 'diffkiln[serve]'" in capsys.readouterr().err


def test_overload_is_refused_at_once_and_what_is_accepted_is_answered(drawing):
    with running(drawing, queue=8, images=8) as served, ThreadPoolExecutor(40) as pool:

        def draw(seed: int) -> tuple[int, float, str]:
            started = time.monotonic()
            answer = httpx2.post(
                f"{served.url}{GENERATIONS}", json={"prompt": "a", "seed": seed}, timeout=60, trust_env=False
            )
            return answer.status_code, time.monotonic() - started, answer.headers.get("retry-after", "")

        found = list(pool.map(draw, range(120)))
    assert {status for status, _, _ in found} == {200, 429}
    assert all(int(after) >= 1 for status, _, after in found if status == 429)


def test_where_there_is_no_room_nothing_is_read_and_the_connection_stays(drawing):
    held = Held(diffkiln.load(drawing))
    with running(drawing, lambda: held, queue=2, images=2) as served, ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(served.draw, n=1, seed=1)]
        eventually(lambda: served.numbers()["diffkiln_running_images"] == 1)  # it leaves the queue
        asked.append(pool.submit(served.draw, n=2, seed=1))
        eventually(lambda: inside(served.client) == 3)
        refused = served.client.post(GENERATIONS, content=b"{" + b" " * 9_000, headers={"content-type": "text/plain"})
        assert (refused.status_code, refused.headers.get("connection")) == (429, None)
        assert "2 images wait already" in refused.json()["error"]["message"]
        assert int(refused.headers["retry-after"]) >= 1
        large = served.client.post(GENERATIONS, content=b" " * 100_000)
        assert (large.status_code, large.headers["connection"]) == (429, "close")
        assert served.client.post(EDITS, content=b"{}").status_code == 404
        held.go.set()
        assert [each.result().status_code for each in asked] == [200, 200]


def test_the_deadline_ends_a_request(drawing):
    with running(drawing, deadline=0.02) as served:
        answer = served.draw(n=8)
        assert answer.status_code == 504
        assert '"type": "error"' in served.draw(n=8, stream=True).text
        ends = time.monotonic() + 10
        while served.numbers()["diffkiln_running_images"]:
            assert time.monotonic() < ends
