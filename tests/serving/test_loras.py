"""Requests with adapters: each gets its own, from the operator's folder and nowhere else."""

from __future__ import annotations

import base64
import io
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import diffkiln
from diffkiln.cli import main
from diffkiln.serving.loras import Loras
from diffkiln.serving.offer import Choice
from diffkiln.serving.orders import Job, Order
from diffkiln.serving.waiting import Queue
from tests.runtime.adapters.files import drawn
from tests.serving.conftest import Running, digits, once, running

LAYER = "transformer.transformer_blocks.0.attn.to_q"
NAMES = ("style", "detail", "line")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, drawing) -> Path:
    made = tmp_path_factory.mktemp("loras")
    with diffkiln.load(drawing) as pipe:
        width = pipe.executor.store.type_of("transformer", f"{LAYER.removeprefix('transformer.')}.weight").shape[0]
    for seed, name in enumerate(NAMES):
        generator = torch.Generator().manual_seed(seed)
        factors = {"lora_A": drawn((4, width), generator, 1.0), "lora_B": drawn((width, 4), generator, 1.0)}
        save_file({f"{LAYER}.{key}.weight": tensor for key, tensor in factors.items()}, made / f"{name}.safetensors")
    (made / ".hidden.safetensors").write_bytes(b"")
    (made / "notes.txt").write_text("")
    return made


@pytest.fixture(scope="module")
def served(drawing, folder):
    with running(drawing, loras=folder, kept_loras=2, images=2) as server:
        yield server


def pixels(answer) -> np.ndarray:
    assert answer.status_code == 200, answer.text
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(answer.json()["data"][0]["b64_json"]))))


def draw(server: Running, **fields) -> np.ndarray:
    return pixels(server.draw(seed=7, **fields))


def test_a_request_gets_the_adapters_that_it_names_and_the_next_one_none(served, drawing, folder):
    plain, styled = draw(served), draw(served, lora={"style": 1})
    assert not np.array_equal(plain, styled)
    with diffkiln.load(drawing) as pipe:
        pipe.load_lora(folder / "style.safetensors")
        generator = torch.Generator().manual_seed(7)
        made = pipe("a seven", generator=[generator], **given(pipe))
    assert np.array_equal(np.asarray(made.images[0]), styled)
    assert np.array_equal(draw(served), plain)
    assert np.array_equal(draw(served, lora={"style": 0}), plain)


def given(pipe) -> dict:
    return {k: v for k, v in pipe.variants[0].fixed.items() if v is not None}


def test_more_adapters_than_are_kept_are_loaded_by_turns(served):
    mixes = [{name: 1} for name in NAMES] + [{"style": 0.5, "detail": -0.5, "line": 1}]
    first = [draw(served, lora=mix) for mix in mixes]
    assert len({image.tobytes() for image in first}) == len(mixes)
    assert all(np.array_equal(draw(served, lora=mix), image) for mix, image in zip(mixes, first, strict=True))


def test_requests_at_once_do_not_mix(served):
    mixes = [{"style": 1}, {"detail": 1}, {}, {"style": 1}]
    alone = [draw(served, lora=mix) for mix in mixes]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda mix: draw(served, lora=mix), mixes))
    assert all(np.array_equal(one, other) for one, other in zip(alone, together, strict=True))


CHOICE = Choice({}, (1, 2, 4), 1, 4)


def job(**lora: float) -> Job:
    return Job(Order("id", {"prompt": "a"}, {}, {}, 1, 0, lora=lora), CHOICE, lambda _: None)


def test_rows_with_other_adapters_do_not_share_a_call():
    queue = Queue(64, 0.0)
    first, other, second = job(a=1.0), job(a=0.5), job(a=1.0)
    for each in (first, other, second):
        queue.put(each)
    assert [[row.job for row in queue.take()] for _ in range(2)] == [[first, second], [other]]


def test_rows_whose_adapters_fit_into_the_slots_share_a_call():
    queue = Queue(64, 0.0)
    queue.slots = 2
    jobs = [job(a=1.0), job(), job(c=1.0, d=1.0), job(b=0.5), job(e=1.0), job(a=0.5, b=1.0)]
    for each in jobs:
        queue.put(each)
    wanted = [[0, 1, 3, 5], [2], [4]]
    assert [[jobs.index(row.job) for row in queue.take()] for _ in wanted] == wanted


def test_a_request_may_mix_more_adapters_than_there_are_slots_and_then_is_alone():
    queue = Queue(64, 0.0)
    queue.slots = 1
    jobs = [job(a=1.0, b=1.0), job(), job(a=1.0, b=1.0)]
    for each in jobs:
        queue.put(each)
    assert [[jobs.index(row.job) for row in queue.take()] for _ in range(2)] == [[0, 2], [1]]


@pytest.mark.more
def test_requests_with_other_adapters_share_a_call_in_slots(tmp_path_factory, folder):
    bundle = once("slots", tmp_path_factory, lambda: digits((1, 2), runtime={"adapters": {"rank": 4, "slots": 2}}))
    with running(bundle, loras=folder, kept_loras=2, images=2, window=2.0) as server:
        mixes = [{"style": 1}, {"detail": -1}]
        alone = [draw(server, lora=mix) for mix in mixes]
        before = server.numbers()["diffkiln_batch_images_count"]
        with ThreadPoolExecutor(2) as pool:
            together = list(pool.map(lambda mix: draw(server, lora=mix), mixes))
        assert server.numbers()["diffkiln_batch_images_count"] == before + 1
    assert not np.array_equal(*alone)
    for one, other in zip(alone, together, strict=True):
        assert np.abs(one.astype(int) - other.astype(int)).max() <= 1, "a batch of two rounds in another way"


@pytest.mark.parametrize("name", ["stile", "../style", ".hidden", "notes", "/etc/passwd", "", "a" * 200])
def test_what_is_not_in_the_folder_is_refused(served, name):
    answer = served.draw(lora={name: 1})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"].startswith("lora")
    if name == "stile":
        assert 'Did you mean "style"' in answer.json()["error"]["message"]


@pytest.mark.parametrize("lora", [{"style": "1"}, {"style": 101}, {"style": None}, ["style"], "style", {"style": True}])
def test_scales_are_numbers_within_bounds(served, lora):
    assert served.draw(lora=lora).status_code == 400


def test_models_name_them(served):
    assert served.client.get("/v1/models").json()["data"][0]["loras"] == sorted(NAMES)


def test_a_file_that_was_replaced_is_read_again(served, folder):
    before = draw(served, lora={"line": 1})
    table = load_file(folder / "line.safetensors")
    save_file({key: tensor * 2 for key, tensor in table.items()}, folder / "line.new")
    (folder / "line.new").rename(folder / "line.safetensors")
    assert not np.array_equal(draw(served, lora={"line": 1}), before)


def test_a_broken_file_is_an_error_of_its_request_alone(served, folder):
    (folder / "broken.safetensors").write_bytes(b"x" * 100)
    answer = served.draw(lora={"broken": 1})
    (folder / "broken.safetensors").unlink()
    assert answer.status_code == 400
    assert "no safetensors file" in answer.json()["error"]["message"]
    draw(served, lora={"style": 1})


def test_without_a_folder_there_is_no_such_field(drawing):
    with running(drawing) as server:
        answer = server.draw(lora={"style": 1})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "lora"


def test_the_least_used_are_forgotten_and_those_of_the_call_never(folder):
    class Pipe:
        def __init__(self) -> None:
            self.loaded: list[str] = []

        def load_lora(self, path: Path, name: str, scale: float) -> None:
            self.loaded.append(name)

        def unload_lora(self, name: str) -> None:
            self.loaded.remove(name)

    pipe, loras = Pipe(), Loras(folder, 2)
    for mix in ({"style": 1.0}, {"detail": 1.0}, {"style": 1.0}, {"line": 1.0}):
        loras.ready(pipe, [mix])
    assert pipe.loaded == ["style", "line"]
    loras.ready(pipe, [{"line": 0.5}, dict.fromkeys(NAMES, 1.0)])
    assert sorted(pipe.loaded) == sorted(NAMES)


def test_a_folder_that_is_not_there_is_refused(drawing, tmp_path, capsys):
    assert main(["serve", str(drawing), "--loras", str(tmp_path / "none"), "--host", "192.0.2.1"]) == 2
    assert "is not a folder" in capsys.readouterr().err
