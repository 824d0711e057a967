"""Requests share calls where they may, in the order in which they came; each image is what its request alone gives."""

from __future__ import annotations

import base64
import io
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

import diffkiln
from diffkiln.errors import CallError
from diffkiln.serving.metrics import Metrics
from diffkiln.serving.offer import Choice, read_offer
from diffkiln.serving.orders import Job, Made, Order, Shown
from diffkiln.serving.refusals import Refusal
from diffkiln.serving.waiting import Queue
from diffkiln.serving.worker import Worker
from tests.serving.conftest import running

ONE = Choice({}, (1, 2, 4), 1, 4)
OTHER = Choice({"height": 64}, (1,), 1, 4)


def job(count: int = 1, choice: Choice = ONE, seed: int = 0, prompt: str = "a seven", told=lambda _: None) -> Job:
    return Job(Order("id", {"prompt": prompt}, {}, {}, count, seed), choice, told)


def test_rows_of_one_kind_leave_together_and_others_keep_their_place():
    queue = Queue(64, 0.0)
    first, other, second, third = job(), job(choice=OTHER), job(), job()
    for each in (first, other, second, third):
        queue.put(each)
    taken = [[row.job for row in queue.take()] for _ in range(3)]
    assert taken == [[first, second], [other], [third]]


@pytest.mark.parametrize(("waiting", "calls"), [(1, [1]), (3, [2, 1]), (5, [4, 1]), (8, [4, 4])])
def test_the_largest_batch_that_is_filled_is_run(waiting, calls):
    queue = Queue(64, 0.0)
    queue.put(job(waiting))
    assert [len(queue.take()) for _ in calls] == calls
    assert len(queue) == 0


def test_a_row_waits_for_others_no_longer_than_the_window():
    queue = Queue(64, 0.2)
    started = time.monotonic()
    queue.put(job())
    threading.Timer(0.05, lambda: queue.put(job())).start()
    assert len(queue.take()) == 2
    assert 0.15 < time.monotonic() - started < 5
    queue.put(job(4))
    started = time.monotonic()
    assert len(queue.take()) == 4
    assert time.monotonic() - started < 0.15


def test_a_full_queue_says_when_to_come_back():
    queue = Queue(4, 0.0)
    queue.put(job(4))
    queue.done(len(queue.take()), 40.0)
    queue.put(job(3))
    with pytest.raises(Refusal, match="3 images wait already") as caught:
        queue.put(job(2))
    assert (caught.value.status, caught.value.retry_after) == (429, 30)
    queue.put(job(1))


def test_jobs_that_nobody_waits_for_free_their_places():
    queue = Queue(4, 0.0)
    gone = job(4)
    queue.put(gone)
    gone.leave()
    queue.put(job(4))
    assert len(queue) == 4
    assert gone not in [row.job for row in queue.take()]


def test_a_closed_queue_gives_what_it_has_and_takes_no_more():
    queue = Queue(4, 60.0)
    queue.put(job())
    queue.close()
    assert len(queue.take()) == 1
    assert queue.take() == []
    with pytest.raises(Refusal) as caught:
        queue.put(job())
    assert caught.value.status == 503


def test_each_image_is_what_its_request_alone_gives(drawing):
    words = ("zero", "one", "two", "three", "four", "five", "six", "seven")
    with diffkiln.load(drawing) as pipe:
        alone = [
            np.asarray(pipe(f"a handwritten {word}", generator=torch.Generator("cpu").manual_seed(seed)).images[0])
            for seed, word in enumerate(words)
        ]
    with running(drawing, window=0.3) as served, ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(served.draw, f"a handwritten {word}", seed=seed) for seed, word in enumerate(words)]
        answers = [each.result().json()["data"][0] for each in asked]
        numbers = served.numbers()
    assert numbers["diffkiln_batch_images_sum"] == 8
    assert numbers["diffkiln_batch_images_count"] < 8
    for seed, (answer, image) in enumerate(zip(answers, alone, strict=True)):
        assert answer["seed"] == seed
        made = np.asarray(Image.open(io.BytesIO(base64.b64decode(answer["b64_json"]))))
        # A product of another batch may be added up in another order: a last bit of float32, so at most one of 255.
        assert abs(made.astype(int) - image).max() <= 1


def test_a_bundle_of_one_large_batch_is_filled_up(tmp_path):
    from tests.serving.conftest import digits

    bundle = diffkiln.compile(digits((2,)), tmp_path / "pairs").path
    with running(bundle) as served:
        assert read_offer(bundle, "pairs").choose({}, False).batches == (2,)
        both = served.draw(seed=4, n=2).json()["data"]
        assert served.draw(seed=4).json()["data"] == both[:1]
        assert len(served.draw(seed=4, n=3).json()["data"]) == 3


class Pipe:
    """A pipeline that fails where it is told to."""

    bundle = type("", (), {"manifest": type("", (), {"runtime": {}})})

    def __init__(self) -> None:
        self.calls: list[list[str]] = []

    def __enter__(self) -> Pipe:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __call__(self, prompt, generator, callback_on_step_end, **_):
        self.calls.append(prompt)
        callback_on_step_end(self, 0, 0.0, {})
        if "bad" in prompt:
            raise CallError("bad: not that")
        return {"images": [f"{text} {each.initial_seed()}" for text, each in zip(prompt, generator, strict=True)]}


def lived(queue: Queue) -> Pipe:
    """A worker that runs what a closed queue holds."""
    pipe = Pipe()
    worker = Worker(lambda: pipe, queue, Metrics())
    queue.close()
    worker.start()
    worker.join(10)
    assert not worker.alive
    return pipe


def test_the_fault_of_one_request_is_not_that_of_those_beside_it():
    queue, told = Queue(8, 0.0), {name: [] for name in ("good", "bad")}
    for name in ("good", "bad", "good"):
        queue.put(job(prompt=name, seed=5, told=told[name].append, count=1))
    queue.put(job(prompt="good", told=told["good"].append))
    pipe = lived(queue)
    assert len(pipe.calls[0]) == 4
    assert [event.picture for event in told["good"]] == ["good 5", "good 5", "good 0"]
    assert [str(event.error) for event in told["bad"]] == ["bad: not that"]


def test_previews_go_to_those_who_asked_and_are_made_once_for_a_call():
    class Seen(Pipe):
        asked = 0

        def preview(self):
            self.asked += 1
            return {"images": ["left", "right"]}

    queue, told = Queue(8, 0.0), {"left": [], "right": []}
    for name in told:
        made = Job(Order("id", {"prompt": name}, {}, {}, 1, 5, previews=3 * (name == "right")), ONE, told[name].append)
        queue.put(made)
    worker = Worker(Seen, queue, Metrics())
    worker.pipe = Seen()
    worker._run(queue.take())
    assert worker.pipe.asked == 1
    assert [type(event) for event in told["left"]] == [Made]
    assert told["right"][0] == Shown(0, 5, 0, "right")


@pytest.mark.parametrize(
    ("steps", "wanted", "shown"), [(8, 3, [2, 4, 6]), (4, 1, [2]), (2, 3, [1]), (1, 3, []), (9, 0, [])]
)
def test_previews_lie_evenly_before_the_last_step(steps, wanted, shown):
    order = Order("id", {}, {}, {}, 1, 0, previews=wanted)
    assert list(Job(order, Choice({}, (1,), 1, steps), lambda _: None).shown) == shown


def test_a_call_goes_on_for_those_who_stay():
    queue, told = Queue(8, 0.0), []
    staying, leaving = job(told=told.append), job()
    queue.put(staying)
    queue.put(leaving)
    rows = queue.take()
    leaving.leave()
    worker = Worker(Pipe, queue, Metrics())
    worker.pipe = Pipe()
    worker._run(rows)
    assert [event.picture for event in told] == ["a seven 0"]


def test_a_call_that_nobody_waits_for_ends_at_its_next_step():
    queue, told, metrics = Queue(8, 0.0), [], Metrics()
    both = [job(told=told.append), job(told=told.append)]
    for each in both:
        queue.put(each)
    rows = queue.take()
    for each in both:
        each.leave()
    worker = Worker(Pipe, queue, metrics)
    worker.pipe = Pipe()
    worker._run(rows)
    assert told == []
    assert b"diffkiln_calls_abandoned_total 1.0" in metrics.text()
