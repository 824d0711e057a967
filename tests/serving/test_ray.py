"""The application on Ray Serve, on this machine: what several processes add to it."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shutil
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import httpx2
import numpy as np
import pytest
import torch
from PIL import Image

import diffkiln
from tests.parallel.specs import shared

pytestmark = [
    pytest.mark.more,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # Ray's own
]

PORT = 8261
URL = f"http://127.0.0.1:{PORT}"
GENERATIONS = "/v1/images/generations"


@pytest.fixture(scope="module")
def ray() -> Iterator[None]:
    import ray
    from ray import serve

    ray.init("local", num_cpus=8, include_dashboard=False, logging_level="warning", log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": PORT})
    yield
    serve.shutdown()
    ray.shutdown()


def run(bundle, **options) -> None:
    from ray import serve

    from diffkiln.serving.ray import app

    serve.run(app(bundle, **options), name="digits", route_prefix="/")


def pixels(answer: httpx2.Response) -> np.ndarray:
    assert answer.status_code == 200, answer.text
    (item,) = answer.json()["data"]
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(item["b64_json"])))).astype(int)


def expected(bundle, count: int) -> list[np.ndarray]:
    with diffkiln.load(bundle) as pipe:
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in range(count)]
        return [np.asarray(pipe("a seven", generator=each).images[0]).astype(int) for each in generators]


def draw(seed: int, **fields) -> httpx2.Response:
    body = {"prompt": "a seven", "seed": seed, **fields}
    return httpx2.post(f"{URL}{GENERATIONS}", json=body, timeout=120, trust_env=False)


def processes(name: str) -> list[int]:
    """The processes of a deployment's replicas, as Serve's own state lists them."""
    from ray.serve._private.api import _get_global_client

    details = _get_global_client().get_serve_details()
    deployment = details["applications"]["digits"]["deployments"][name]
    return [replica["pid"] for replica in deployment["replicas"] if replica["state"] == "RUNNING"]


def test_a_killed_replica_loses_and_mixes_up_nothing(ray, drawing):
    run(drawing, replicas=2, ongoing=8, queue=64)
    wanted = expected(drawing, 60)
    victim = processes("Replica")[0]
    with ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(draw, seed) for seed in range(60)]
        answers[15].result()
        os.kill(victim, signal.SIGKILL)
        images = [pixels(answer.result()) for answer in answers]
    for seed, image in enumerate(images):
        assert abs(image - wanted[seed]).max() <= 1, seed


def test_a_refusal_of_a_replica_reaches_the_client(ray, drawing):
    run(drawing, replicas=1)
    answer = draw(0, prompt="x" * 4000)
    assert answer.status_code == 200
    assert draw(0, size="3x3").status_code == 400


def test_what_is_beyond_the_queue_gets_429(ray, drawing):
    run(drawing, replicas=1, ongoing=1, queue=2, images=2)
    with ThreadPoolExecutor(24) as pool:
        statuses = [answer.status_code for answer in pool.map(draw, range(24))]
    assert set(statuses) == {200, 429}


def test_a_client_that_leaves_frees_the_replica(ray, drawing):
    run(drawing, replicas=1, ongoing=1, queue=1, images=8)
    with httpx2.stream("POST", f"{URL}{GENERATIONS}", json={"prompt": "a", "n": 8, "stream": True}) as reading:
        next(reading.iter_lines())
    started = time.monotonic()
    while (status := draw(1).status_code) != 200:
        assert status == 429
        assert time.monotonic() - started < 10
        time.sleep(0.05)


def test_two_bundles_share_a_replica_that_holds_one(ray, drawing, tmp_path):
    other = shutil.copytree(drawing, tmp_path / "other")
    run({"one": drawing, "two": other}, replicas=1, loaded=1, allow_native=True)
    models = httpx2.get(f"{URL}/v1/models", trust_env=False).json()["data"]
    assert [model["id"] for model in models] == ["one", "two"]
    first, second = pixels(draw(3, model="one")), pixels(draw(3, model="two"))
    assert np.array_equal(first, second)
    assert np.array_equal(first, pixels(draw(3)))
    assert draw(3, model="three").status_code == 400


def test_a_rolling_update_loses_no_request(ray, drawing, tmp_path):
    """A client that sends its next request while old and new replicas stand side by side."""
    other = shutil.copytree(drawing, tmp_path / "digits")
    run(drawing, replicas=2)
    statuses, ends = [], time.monotonic() + 300
    with ThreadPoolExecutor(4) as pool:
        updating = pool.submit(run, other, replicas=2, allow_native=True)
        while not updating.done() and time.monotonic() < ends:
            statuses += [answer.status_code for answer in pool.map(draw, range(3))]
        updating.result()
    assert len(statuses) >= 3
    assert set(statuses) == {200}, json.dumps(statuses)


def others() -> list[int]:
    """The processes that run calls together with a replica, by the title that Ray gives them."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if file.read_bytes().startswith(b"ray::Process"):
                found.append(int(file.parent.name))
    return found


@pytest.fixture(scope="module")
def together(families, tmp_path_factory) -> Path:
    """A FLUX-like bundle whose tokens two processes share, and whose text encoder the first one alone runs."""
    parallel = {"sequence": 2, "first": ["text_encoder_2"]}
    return diffkiln.compile(shared(families, "flux", parallel), tmp_path_factory.mktemp("together") / "bundle").path


def test_two_processes_are_one_replica_that_ray_starts_anew_if_one_ends(ray, families, together, tmp_path):
    run({"digits": together}, replicas=1)
    wanted = expected(diffkiln.compile(shared(families, "flux", {}), tmp_path / "alone").path, 4)
    for seed in (0, 1):
        assert abs(pixels(draw(seed)) - wanted[seed]).max() <= 1
    (other,) = others()
    os.kill(other, signal.SIGKILL)
    for seed in (2, 3):
        assert abs(pixels(draw(seed)) - wanted[seed]).max() <= 1
    (new,) = others()
    assert new != other


def test_a_bundle_of_several_processes_is_alone_in_its_application(drawing, together):
    from diffkiln.serving.ray import app

    with pytest.raises(diffkiln.errors.Incompatible, match="one runs in 2 processes"):
        app({"one": together, "two": drawing})


def test_a_replica_with_too_few_processes_says_what_to_write(ray, together):
    from diffkiln.serving.ray_processes import load_together

    with pytest.raises(diffkiln.errors.Incompatible, match=r'2 process\(es\), and a replica has 1.*"processes": 2'):
        load_together(str(together), cpus=1, gpus=0, device="cpu")


def exported() -> str:
    """What Ray tells Prometheus of all processes of this machine."""
    import ray

    (node,) = ray.nodes()
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    return httpx2.get(url, timeout=10, trust_env=False).text


def test_ray_exports_the_numbers_of_fronts_and_replicas(ray, drawing):
    run({"numbered": drawing}, replicas=1)
    assert draw(1).status_code == 200
    wanted = [
        rf'ray_diffkiln_requests_total{{.*deployment="Front".*route="{GENERATIONS}",status="200"',
        r'ray_diffkiln_batch_images_count{.*bundle="numbered".*deployment="Replica"',
        r'ray_diffkiln_phase_seconds_bucket{.*bundle="numbered".*phase="denoise"',
        r'ray_diffkiln_queue_images{.*bundle="numbered".*} 0\.0',
        r'ray_diffkiln_weights_bytes{.*bundle="numbered".*} [1-9]',
    ]
    ends = time.monotonic() + 60  # Ray collects them every few seconds
    while missing := [line for line in wanted if not re.search(line, exported())]:
        assert time.monotonic() < ends, (missing, [row for row in exported().splitlines() if "diffkiln" in row])
        time.sleep(1)
