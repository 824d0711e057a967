"""Jobs for videos: by OpenAI's own client, within bounds, until they expire."""

from __future__ import annotations

import asyncio
import base64
import io
import time
from collections.abc import Iterator
from dataclasses import replace

import openai
import pytest
from PIL import Image

import diffkiln
from diffkiln.errors import CallError
from diffkiln.serving.orders import Accepted, Finished, Order, Progress
from diffkiln.serving.refusals import Refusal
from diffkiln.serving.settings import Settings, digests
from diffkiln.serving.video_jobs import VideoJobs
from tests.serving.conftest import VIDEOS, Held, Running, running

JOBS = "/v1/videos"
pytestmark = pytest.mark.filterwarnings("ignore:The Sora API is scheduled")


@pytest.fixture(scope="module")
def served(filming) -> Iterator[Running]:
    with running(filming) as made:
        yield made


def ended(served: Running, identity: str, **headers: str) -> dict:
    ends = time.monotonic() + 60
    while (shown := served.client.get(f"{JOBS}/{identity}", headers=headers).json())["status"] in (
        "queued",
        "in_progress",
    ):
        assert time.monotonic() < ends
        time.sleep(0.01)
    return shown


def test_the_client_of_openai_makes_fetches_lists_and_deletes_videos(served, client_of):
    videos = client_of(served).videos
    asked = videos.create(prompt="a fox", size="48x32", extra_body={"seed": 1, "fps": 8})
    assert (asked.status, asked.progress, asked.model, asked.prompt) == ("queued", 0, "videos", "a fox")
    assert (asked.seconds, asked.size) == ("0.62", "48x32")
    made = videos.poll(asked.id, poll_interval_ms=10)
    assert (made.status, made.progress, made.error) == ("completed", 100, None)
    assert made.expires_at - made.completed_at == 3600
    answer = served.draw("a fox", path=VIDEOS, seed=1, fps=8).json()
    assert videos.download_content(made.id).content == base64.b64decode(answer["data"][0]["b64_json"])
    other = videos.create_and_poll(prompt="two foxes", poll_interval_ms=10)
    assert [video.id for video in videos.list()] == [other.id, made.id]
    assert [video.id for video in videos.list(limit=1)] == [other.id, made.id]  # by pages
    assert [video.id for video in videos.list(order="asc", after=made.id)] == [other.id]
    for video in (made, other):
        assert videos.delete(video.id).deleted
    assert list(videos.list()) == []
    with pytest.raises(openai.NotFoundError, match="it was deleted, has expired, made room"):
        videos.retrieve(made.id)
    assert served.numbers()['diffkiln_phase_seconds_count{phase="job"}'] == 2
    assert served.numbers()['diffkiln_requests_total{route="/v1/videos/{video_id}",status="404"}'] == 1


def test_a_job_takes_json_and_other_formats(served):
    asked = served.client.post(JOBS, json={"prompt": "a fox", "output_format": "gif"}).json()
    assert ended(served, asked["id"])["status"] == "completed"
    answer = served.client.get(f"{JOBS}/{asked['id']}/content")
    assert answer.headers["content-type"] == "image/gif"
    assert answer.headers["content-disposition"] == f'attachment; filename="{asked["id"]}.gif"'
    assert Image.open(io.BytesIO(answer.content)).n_frames == 5


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ({"prompt": "a", "stream": True}, "stream: a job does not take it. POST /v1/videos/generations"),
        ({"prompt": "a", "n": 2}, "n: a job does not take it"),
        ({"prompt": "a", "seconds": "8"}, "seconds: a bundle's videos have a number of frames that is fixed"),
        ({"prompt": "a", "size": "3x3"}, "size: "),
        ({}, "prompt: Field required"),
    ],
)
def test_a_job_that_cannot_be_is_refused_at_once(served, body, told):
    answer = served.client.post(JOBS, json=body)
    assert answer.status_code == 400
    assert told in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("path", "status", "told"),
    [
        ("?limit=0", 400, "limit: "),
        ("?order=up", 400, "order: "),
        ("?after=video_x", 404, "lost with it"),
        ("/generations", 404, "generations is no video's id"),
        ("/video_0123456789", 404, "before it was started again: jobs are kept in memory, and lost with it"),
        ("/video_0/content", 404, "video_0"),
        ("/video_0/content?variant=thumbnail", 400, "variant: "),
        ("/video_0/remix", 404, "nothing is here"),
    ],
)
def test_what_is_not_there_is_said(served, path, status, told):
    answer = served.client.get(f"{JOBS}{path}")
    assert answer.status_code == status
    assert told in answer.json()["error"]["message"]


def test_a_method_that_a_path_has_not_is_told_all_that_it_has(served):
    for path, methods in ((JOBS, "GET, POST"), (f"{JOBS}/video_0", "DELETE, GET"), (VIDEOS, "POST")):
        answer = served.client.put(path)
        assert (answer.status_code, answer.headers["allow"]) == (405, methods)


def test_jobs_are_deleted_on_their_way_fail_with_a_reason_and_are_their_tokens_own(filming, client_of):
    held = Held(diffkiln.load(filming))
    mine, others = "x" * 20, "y" * 20
    owner = {"authorization": f"Bearer {mine}"}
    tokens = digests([mine, others], "here")
    with running(filming, lambda: held, tokens=tokens, kept_videos=2, queue=8) as served:
        first, second = client_of(served, mine).videos, client_of(served, others).videos
        one, two = first.create(prompt="one"), first.create(prompt="two")
        with pytest.raises(openai.ConflictError, match="this video is queued, 0 %"):
            first.download_content(one.id)
        with pytest.raises(openai.RateLimitError, match="2 videos are being made or wait already"):
            first.create(prompt="three")
        with pytest.raises(openai.NotFoundError, match="another token's"):
            second.delete(one.id)
        assert list(second.list()) == []
        assert first.delete(one.id).deleted
        held.go.set()
        assert ended(served, two.id, **owner)["status"] == "completed"
        numbers = served.client.get("/metrics", headers=owner).text
        assert "diffkiln_calls_abandoned_total 1.0" in numbers
        held.error = CallError("the fox is gone")
        failed = ended(served, first.create(prompt="four").id, **owner)
        assert (failed["status"], failed["error"]["message"]) == ("failed", "the fox is gone")
        with pytest.raises(openai.NotFoundError, match="this video failed: the fox is gone"):
            first.download_content(failed["id"])
        held.error = None
        made = first.create(prompt="five")  # for which the oldest makes room
        with pytest.raises(openai.NotFoundError, match="made room"):
            first.retrieve(two.id)
        held.go.clear()
        first.delete(made.id)
        first.create(prompt="six")  # which the server's end gives up
        held.go.set()


# -- without a server --

ORDER = Order("id", {"prompt": "a fox"}, {}, {}, 1, 7, "mp4")


async def add(jobs: VideoJobs, size: int = 10, seconds: float = 0.0):
    async def events():
        yield Accepted()
        yield Progress(1, 2)
        await asyncio.sleep(seconds)
        yield Progress(2, 2)
        yield Finished(0, 7, b"x" * size)

    return (await jobs.add(ORDER, events(), b"", "videos", "48x32", "1")).id


def test_videos_expire():
    async def live():
        jobs = VideoJobs(Settings(kept_video_seconds=0.05))
        identity = await add(jobs)
        await asyncio.sleep(0.01)
        assert jobs.get(identity, b"").data == b"x" * 10
        await asyncio.sleep(0.1)
        with pytest.raises(Refusal, match="has expired"):
            jobs.get(identity, b"")

    asyncio.run(live())


def test_the_oldest_file_makes_room_for_the_latest_and_one_that_is_too_large_fails():
    async def live():
        jobs = VideoJobs(replace(Settings(), kept_video_bytes=25))
        kept = []
        for size in (10, 10, 10, 30):
            kept.append(await add(jobs, size))
            await asyncio.sleep(0.01)
        assert [job.id for job in jobs.listed(b"", None, 9, newest_first=False).data] == kept[1:]
        error = jobs.get(kept[3], b"").shown.error
        assert "the file has 30 bytes, more than the 25 that are kept" in error.message

    asyncio.run(live())


def test_a_job_shows_its_steps_and_fails_when_its_time_is_over():
    async def live():
        times = []
        jobs = VideoJobs(replace(Settings(), job_seconds=0.05), times.append)
        identity = await add(jobs, seconds=10)
        await asyncio.sleep(0.01)
        assert (jobs.get(identity, b"").shown.status, jobs.get(identity, b"").shown.progress) == ("in_progress", 50)
        await asyncio.sleep(0.1)
        assert jobs.get(identity, b"").shown.status == "failed"
        assert times[0] >= 0.05

    asyncio.run(live())


def test_a_job_that_the_queue_refuses_is_none_and_one_that_waits_for_long_is_queued(monkeypatch):
    monkeypatch.setattr("diffkiln.serving.video_jobs._PATIENCE", 0.01)

    async def full():
        raise Refusal(429, "full")
        yield

    async def slow():
        await asyncio.sleep(0.05)
        raise Refusal(429, "full")
        yield

    async def live():
        jobs = VideoJobs(Settings())
        with pytest.raises(Refusal, match="full"):
            await jobs.add(ORDER, full(), b"", "videos", "48x32", "1")
        assert jobs.listed(b"", None, 9, newest_first=True).data == []
        waiting = await jobs.add(ORDER, slow(), b"", "videos", "48x32", "1")
        assert waiting.status == "queued"
        await asyncio.sleep(0.1)
        assert jobs.get(waiting.id, b"").shown.error.code == "rate_limit_error"

    asyncio.run(live())
