"""Bundles to serve, which replay their programs and so are compiled in seconds, and servers in this process."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from filelock import FileLock

import diffkiln
from diffkiln.bundle import open_bundle, write_receipt
from diffkiln.serving.offer import Offer, read_offer
from diffkiln.serving.server import LocalServer, listen
from diffkiln.serving.settings import Settings
from tests.conftest import DIGITS
from tests.pipelines import build_folder

STEPS = 4
GENERATIONS, EDITS, VIDEOS = "/v1/images/generations", "/v1/images/edits", "/v1/videos/generations"


def once(name: str, tmp_path_factory: pytest.TempPathFactory, spec: Callable[[], dict[str, Any]]) -> Path:
    """A bundle that the first process of the run compiles."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    output = shared / f"served-{name}" / name
    with FileLock(shared / f"served-{name}.lock"):
        if not output.exists():
            output.parent.mkdir(exist_ok=True)
            return diffkiln.compile(spec(), output).path
    with open_bundle(output) as bundle:
        write_receipt(bundle.id)
    return output


def digits(batches: tuple[int, ...] = (1,), **changed: Any) -> dict[str, Any]:
    spec = json.loads((DIGITS / "spec.json").read_text()) | {"passes": [], "runtime": {}} | changed
    spec["source"] = {**spec["source"], "model": str(DIGITS / "model")}
    inputs = {**spec["inputs"], "num_inference_steps": STEPS}
    return spec | {"inputs": [{**inputs, "batch_size": batch} for batch in batches]}


@pytest.fixture(scope="session")
def drawing(tmp_path_factory) -> Path:
    """Digits in batches of one, two and four."""
    return once("digits", tmp_path_factory, lambda: digits((1, 2, 4)))


@pytest.fixture(scope="session")
def editing(tmp_path_factory) -> Path:
    """Digits from images."""

    def spec() -> dict[str, Any]:
        made = digits((1, 2), **json.loads((DIGITS / "spec-image-to-image.json").read_text()) | {"passes": []})
        return made | {"runtime": {}}

    return once("edits", tmp_path_factory, spec)


@pytest.fixture(scope="session")
def filming(tmp_path_factory) -> Path:
    """Videos of five frames, from random weights."""

    def spec() -> dict[str, Any]:
        folder = build_folder("wan", tmp_path_factory.mktemp("wan"))
        inputs = {"height": 32, "width": 48, "num_frames": 5, "num_inference_steps": 2, "guidance_scale": 5.0}
        inputs["call"] = {"max_sequence_length": 32}
        return {"spec_version": 1, "source": {"model": str(folder)}, "target": {"device": "cpu"}, "inputs": inputs}

    return once("videos", tmp_path_factory, spec)


@dataclass
class Running:
    """A server that answers."""

    url: str
    server: LocalServer
    client: httpx2.Client

    def draw(self, prompt: str = "a seven", path: str = GENERATIONS, **fields: Any) -> httpx2.Response:
        return self.client.post(path, json={"prompt": prompt, **fields})

    def numbers(self) -> dict[str, float]:
        """The lines of /metrics, by name and labels."""
        lines = self.client.get("/metrics").text.splitlines()
        rows = (line.rpartition(" ") for line in lines if not line.startswith("#"))
        return {name: float(value) for name, _, value in rows}


@contextmanager
def running(
    bundle: Path,
    load: Callable[[], Any] | None = None,
    wait: bool = True,
    offer: Offer | None = None,
    **limits: Any,
) -> Iterator[Running]:
    """Serves a bundle on a free port of this machine until the block ends."""
    settings = Settings(**limits)
    server = LocalServer(offer or read_offer(bundle, bundle.name), load or (lambda: diffkiln.load(bundle)), settings)
    with listen("127.0.0.1", 0) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        thread = threading.Thread(target=server.run, args=(listener,), name="server")
        thread.start()
        with httpx2.Client(base_url=url, timeout=120, trust_env=False) as client:
            try:
                if wait:
                    await_ready(client)
                yield Running(url, server, client)
            finally:
                server.stop()
                thread.join(60)
    assert not thread.is_alive()


class Held:
    """A pipeline whose steps wait until they are let go, and which fails if it is told to."""

    def __init__(self, pipe) -> None:
        self.pipe, self.bundle, self.executor = pipe, pipe.bundle, pipe.executor
        self.go, self.error = threading.Event(), None

    def __enter__(self):
        return self

    def __exit__(self, *_: object) -> None:
        self.pipe.close()

    def __call__(self, callback_on_step_end, **keywords):
        def end(*given):
            self.go.wait(30)
            if self.error is not None:
                raise self.error
            return callback_on_step_end(*given)

        return self.pipe(callback_on_step_end=end, **keywords)


def await_ready(client: httpx2.Client, seconds: float = 120) -> None:
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        try:
            if client.get("/ready").status_code == 200:
                return
        except httpx2.TransportError:
            pass
        time.sleep(0.05)
    raise AssertionError("the server did not become ready")


@pytest.fixture(scope="module")
def served(drawing) -> Iterator[Running]:
    """Digits, for tests that leave the server as it was."""
    with running(drawing) as made:
        yield made


@pytest.fixture
def client_of() -> Iterator[Callable[..., openai.OpenAI]]:
    """Gives clients of OpenAI, which are closed after the test."""
    with ExitStack() as opened:

        def client(served: Running, key: str = "unused") -> openai.OpenAI:
            made = openai.OpenAI(base_url=f"{served.url}/v1", api_key=key, max_retries=0)
            return opened.enter_context(made)

        yield client
