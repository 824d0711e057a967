"""The routes, as clients see them: against a server on a real port."""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from dataclasses import replace

import httpx2
import numpy as np
import openai
import pytest
import torch
from PIL import Image

import diffkiln
from diffkiln.errors import Incompatible
from diffkiln.serving.offer import read_offer
from tests.serving.conftest import EDITS, GENERATIONS, STEPS, VIDEOS, running


def pixels(data: str | bytes) -> np.ndarray:
    raw = base64.b64decode(data) if isinstance(data, str) else data
    return np.asarray(Image.open(io.BytesIO(raw)).convert("RGB")).astype(int)


def alone(bundle, prompt: str, seed: int) -> np.ndarray:
    with diffkiln.load(bundle) as pipe:
        return np.asarray(pipe(prompt, generator=torch.Generator("cpu").manual_seed(seed)).images[0]).astype(int)


def test_an_image_is_what_the_bundle_draws(served, drawing):
    answer = served.draw("a handwritten seven", seed=7, size="32x32").json()
    (item,) = answer["data"]
    assert item["seed"] == 7
    assert (answer["size"], answer["output_format"]) == ("32x32", "png")
    assert np.array_equal(pixels(item["b64_json"]), alone(drawing, "a handwritten seven", 7))


def test_several_images_have_the_seeds_after_the_first(served, drawing):
    data = served.draw("a three", seed=3, n=3).json()["data"]
    assert [item["seed"] for item in data] == [3, 4, 5]
    for item in data:
        assert abs(pixels(item["b64_json"]) - alone(drawing, "a three", item["seed"])).max() <= 1


def test_a_random_seed_is_told_and_draws_the_same_again(served):
    first = served.draw("a five").json()["data"][0]
    again = served.draw("a five", seed=first["seed"]).json()["data"][0]
    assert first == again
    assert served.draw("a five").json()["data"][0]["seed"] != first["seed"]


@pytest.mark.parametrize(("ending", "magic"), [("png", b"\x89PNG"), ("jpeg", b"\xff\xd8"), ("webp", b"RIFF")])
def test_formats(served, ending, magic):
    url = served.draw(seed=1, output_format=ending, response_format="url").json()["data"][0]["url"]
    head, _, text = url.partition(",")
    assert head == f"data:image/{ending};base64"
    assert base64.b64decode(text).startswith(magic)


def test_the_client_of_openai_draws_lists_streams_and_reads_errors(served, client_of):
    client = client_of(served)
    (model,) = client.models.list().data
    made = client.images.generate(model=model.id, prompt="a nine", n=2, size="32x32", extra_body={"seed": 5})
    assert [pixels(item.b64_json).shape for item in made.data] == [(32, 32, 3)] * 2
    events = list(client.images.generate(model=model.id, prompt="a nine", stream=True, extra_body={"seed": 5}))
    assert [event.type for event in events] == ["image_generation.progress"] * STEPS + ["image_generation.completed"]
    assert events[-1].b64_json == made.data[0].b64_json
    with pytest.raises(openai.BadRequestError, match="size: Input should be 'auto' or '32x32'"):
        client.images.generate(prompt="a nine", size="1024x1024")
    with pytest.raises(openai.BadRequestError, match="model: "):
        client.images.generate(prompt="a nine", model="dall-e-3")


def test_an_edit_takes_the_image_that_openais_client_sends(editing, client_of):
    drawn = io.BytesIO()
    Image.new("RGB", (50, 40), "white").save(drawn, "PNG")
    with running(editing) as served:
        client = client_of(served)
        made = client.images.edit(image=("a.png", drawn.getvalue()), prompt="a nine", extra_body={"seed": 3})
        (event,) = [
            event
            for event in client.images.edit(
                image=[("a.png", drawn.getvalue())], prompt="a nine", stream=True, extra_body={"seed": 3}
            )
            if event.type == "image_edit.completed"
        ]
        assert event.b64_json == made.data[0].b64_json
        with diffkiln.load(editing) as pipe:
            generator = torch.Generator("cpu").manual_seed(3)
            expected = pipe("a nine", image=Image.open(drawn), generator=generator).images[0]
        assert np.array_equal(pixels(made.data[0].b64_json), np.asarray(expected).astype(int))
        refused = served.client.post(EDITS, data={"prompt": "a nine"}, files={"mask": ("m.png", drawn.getvalue())})
        assert refused.status_code == 400
        assert "image: edits takes 1 image here, and none came" in refused.json()["error"]["message"]
        assert served.client.post(GENERATIONS, json={"prompt": "a nine"}).status_code == 404


def test_a_video_comes_as_mp4(filming):
    with running(filming) as served:
        answer = served.draw("a fox", path=VIDEOS, seed=1, fps=8).json()
        assert answer["output_format"] == "mp4"
        assert base64.b64decode(answer["data"][0]["b64_json"])[4:8] == b"ftyp"
        events = served.draw("a fox", path=VIDEOS, seed=1, stream=True, partial_images=3).text
        assert events.count('"partial_image_index"') == 1  # two steps, the last of which is the video
        shown = next(line for line in events.splitlines() if "partial_image_index" in line and line.startswith("data"))
        assert pixels(json.loads(shown[6:])["b64_json"]).shape == (32, 48, 3)
        gif = served.draw("a fox", path=VIDEOS, seed=1, output_format="gif", negative_prompt="blur").json()
        assert Image.open(io.BytesIO(base64.b64decode(gif["data"][0]["b64_json"]))).n_frames == 5


def stopped(bundle, prompt: str, seed: int, step: int) -> np.ndarray:
    """The image of a call that ends after a step."""

    def end(pipe, number, _timestep, _values):
        if number + 1 == step:
            pipe.interrupt()

    with diffkiln.load(bundle) as pipe:
        generator = torch.Generator("cpu").manual_seed(seed)
        return np.asarray(pipe(prompt, generator=generator, callback_on_step_end=end).images[0]).astype(int)


def test_previews_come_as_the_events_of_openai_and_are_the_latents_of_their_steps(served, drawing, client_of):
    client = client_of(served)
    asked = client.images.generate(prompt="a nine", stream=True, partial_images=2, extra_body={"seed": 5})
    events = [event for event in asked if event.type != "image_generation.progress"]
    assert [type(event).__name__ for event in events] == ["ImageGenPartialImageEvent"] * 2 + ["ImageGenCompletedEvent"]
    for number, (event, step) in enumerate(zip(events, (1, 2), strict=False)):
        assert (event.partial_image_index, event.output_format, event.size) == (number, "png", "32x32")
        assert np.array_equal(pixels(event.b64_json), stopped(drawing, "a nine", 5, step))
    assert events[-1].b64_json == served.draw("a nine", seed=5).json()["data"][0]["b64_json"]
    assert served.numbers()['diffkiln_phase_seconds_count{phase="preview"}'] == 1


def test_previews_that_nobody_can_give_are_refused(served, drawing):
    def refused(server, **fields):
        answer = server.draw(partial_images=2, **fields)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "partial_images")
        return answer.json()["error"]["message"]

    assert 'Send "stream": true too' in refused(served)
    assert "less than or equal to 3" in served.draw(partial_images=4, stream=True).json()["error"]["message"]
    assert served.draw(partial_images=0).status_code == 200
    with running(drawing, offer=replace(read_offer(drawing, "digits"), one_launch=True)) as whole:
        assert "no step before the last, since all steps are one CUDA graph" in refused(whole, stream=True)
        assert '"shows": false' in whole.client.get("/").text


def test_models_tell_what_may_be_asked_for(served, drawing):
    (model,) = served.client.get("/v1/models").json()["data"]
    assert (model["id"], model["sizes"], model["num_inference_steps"]) == ("digits", ["32x32"], [STEPS])
    assert model["batches"] == [1, 2, 4]
    assert served.client.get("/health").json() == {"status": "ok"}


def test_until_the_bundle_is_loaded_nothing_is_answered_and_health_is_good(drawing):
    loading = threading.Event()

    def load():
        loading.wait(60)
        return diffkiln.load(drawing)

    with running(drawing, load, wait=False) as served:
        ready, drawn = served.client.get("/ready"), served.draw()
        assert (ready.status_code, drawn.status_code) == (503, 503)
        assert ready.headers["retry-after"] == "2"
        assert served.client.get("/health").status_code == 200
        loading.set()
        while served.client.get("/ready").status_code != 200:
            time.sleep(0.02)
        assert served.draw().status_code == 200


def test_a_bundle_that_cannot_be_loaded_ends_the_server_with_its_error(drawing):
    from diffkiln.serving.server import LocalServer, listen
    from diffkiln.serving.settings import Settings

    def load():
        raise Incompatible("another machine")

    server = LocalServer(read_offer(drawing, "digits"), load, Settings())
    with listen("127.0.0.1", 0) as listener, pytest.raises(Incompatible, match="another machine"):
        server.run(listener)


def test_numbers_for_prometheus(drawing):
    with running(drawing) as served:
        assert served.draw(n=4, seed=1).status_code == 200
        served.draw(n=0)
        numbers = served.numbers()
    route = f'route="{GENERATIONS}"'
    assert numbers[f'diffkiln_requests_total{{{route},status="200"}}'] == 1
    assert numbers[f'diffkiln_requests_total{{{route},status="400"}}'] == 1
    assert numbers["diffkiln_batch_images_sum"] == 4
    assert numbers["diffkiln_queue_images"] == numbers["diffkiln_running_images"] == 0
    assert numbers["diffkiln_weights_bytes"] > 1e6
    assert numbers["process_resident_memory_bytes"] > 1e6
    for phase in ("queue", "denoise", "decode", "encode", "request"):
        assert numbers[f'diffkiln_phase_seconds_count{{phase="{phase}"}}'] >= 1


def test_a_request_has_an_id_of_its_own_or_the_clients(served):
    given = served.client.get("/health", headers={"x-request-id": "abc-1"})
    assert given.headers["x-request-id"] == "abc-1"
    forged = served.client.get("/health", headers={"x-request-id": "a b\x09c"})
    assert len(forged.headers["x-request-id"]) == 16


def test_a_page_of_another_site_cannot_spend_the_gpu(served):
    headers = {"sec-fetch-site": "cross-site"}
    refused = served.client.post(GENERATIONS, json={"prompt": "a seven"}, headers=headers)
    assert refused.status_code == 403
    assert served.client.get("/", headers=headers).status_code == 200


def test_a_client_that_leaves_ends_its_call_at_the_next_step(drawing):
    with running(drawing) as served:
        impatient = httpx2.Timeout(60, read=0.03)
        with pytest.raises(httpx2.ReadTimeout):
            httpx2.post(f"{served.url}{GENERATIONS}", json={"prompt": "a seven", "n": 8}, timeout=impatient)
        with httpx2.stream(
            "POST", f"{served.url}{GENERATIONS}", json={"prompt": "a", "n": 8, "stream": True}
        ) as reading:
            next(reading.iter_lines())
        ends = time.monotonic() + 10
        while (numbers := served.numbers())["diffkiln_running_images"] or numbers["diffkiln_queue_images"]:
            assert time.monotonic() < ends
            time.sleep(0.01)
        assert numbers["diffkiln_calls_abandoned_total"] >= 1
        assert served.draw(seed=1).status_code == 200
