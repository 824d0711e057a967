"""Calling a loaded bundle with the keywords that people pass every day, compared with diffusers."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
import torch

import diffkiln
from diffkiln.errors import CallError
from diffkiln.interpreter.portable import portable
from diffkiln.interpreter.quiet import quiet_libraries
from tests.end_to_end.test_families import spec_of
from tests.pipelines import WARNING_FILTERS
from tests.portably import Portably, as_recorded

pytestmark = [pytest.mark.filterwarnings(text) for text in WARNING_FILTERS]


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    """Stable Diffusion, which has guidance and negative prompts, in three variants."""
    made = spec_of("sd", tmp_path_factory.mktemp("sd"))
    one = made["inputs"]
    return made | {"inputs": [one, one | {"batch_size": 2}, one | {"num_images_per_prompt": 2}]}


@pytest.fixture(scope="module")
def pipe(spec, tmp_path_factory):
    built = diffkiln.compile(spec, tmp_path_factory.mktemp("bundle") / "sd")
    with diffkiln.load(built.path) as loaded:
        yield Portably(loaded)


@pytest.fixture(scope="module")
def eager(spec):
    from diffusers import DiffusionPipeline

    with quiet_libraries(), portable():
        loaded = DiffusionPipeline.from_pretrained(spec["source"]["model"])
    loaded.set_progress_bar_config(disable=True)
    one = {key: value for key, value in spec["inputs"][0].items() if key != "call"} | spec["inputs"][0]["call"]

    def call(*args, **keywords):
        with quiet_libraries(), as_recorded():
            return loaded(*args, **one | keywords)

    return call


def seeded(*seeds):
    made = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    return made[0] if len(made) == 1 else made


def both(pipe, eager, *args, **keywords):
    """The two results as tensors, with generators of the same seeds."""
    seeds = keywords.pop("seeds", (5,))
    want = eager(*args, output_type="pt", generator=seeded(*seeds), **keywords).images
    got = pipe(*args, output_type="pt", generator=seeded(*seeds), **keywords).images
    return want, got


@pytest.mark.parametrize(
    "keywords",
    [
        {},
        {"negative_prompt": "blurred, dark"},
        {"guidance_scale": 3.25},
        {"guidance_scale": 11.0, "negative_prompt": "blurred"},
    ],
    ids=str,
)
def test_keywords_give_what_they_give_in_diffusers(pipe, eager, keywords):
    want, got = both(pipe, eager, "A red Fox", **keywords)
    assert torch.equal(want, got)


def test_a_batch_of_prompts_with_a_generator_each(pipe, eager):
    want, got = both(pipe, eager, ["A red Fox", "a blue cat"], seeds=(1, 2))
    assert torch.equal(want, got)
    assert got.shape[0] == 2


def test_several_images_for_a_prompt_are_a_variant(pipe, eager):
    want, got = both(pipe, eager, "A red Fox", num_images_per_prompt=2)
    assert torch.equal(want, got)


def test_own_latents(pipe, eager):
    probe = []

    def watch(_pipe, _step, _timestep, values):
        probe.append(values["latents"].shape)
        return {}

    pipe("fox", callback_on_step_end=watch)
    latents = torch.randn(probe[0], generator=seeded(9))
    want, got = both(pipe, eager, "A red Fox", latents=latents)
    assert torch.equal(want, got)
    with pytest.raises(CallError, match="latents: shape"):
        pipe("A red Fox", latents=latents[..., :-1])


def test_the_callback_sees_every_step_and_may_replace_the_latents(pipe, eager):
    seen = {"pipe": [], "eager": []}

    def callback(who):
        def end(_pipe, step, timestep, values):
            seen[who].append((step, float(timestep), values["latents"].clone()))
            return {"latents": values["latents"] * 0.5} if step == 1 else {}

        return end

    generator = seeded(5)
    want = eager("Fox", output_type="pt", generator=generator, callback_on_step_end=callback("eager")).images
    got = pipe("Fox", output_type="pt", generator=seeded(5), callback_on_step_end=callback("pipe")).images
    assert torch.equal(want, got)
    assert [entry[:2] for entry in seen["pipe"]] == [entry[:2] for entry in seen["eager"]]
    assert all(torch.equal(a[2], b[2]) for a, b in zip(seen["pipe"], seen["eager"], strict=True))


def test_the_callback_may_not_change_the_shape(pipe):
    with pytest.raises(CallError, match="callback_on_step_end"):
        pipe("Fox", callback_on_step_end=lambda *_: {"latents": torch.zeros(1)})
    assert pipe("Fox").images


def test_output_types(pipe, eager):
    array = pipe("Fox", output_type="np", generator=seeded(5)).images
    np.testing.assert_array_equal(array, eager("Fox", output_type="np", generator=seeded(5)).images)
    (picture,) = pipe("Fox", output_type="pil", generator=seeded(5)).images
    np.testing.assert_array_equal(np.asarray(picture), np.round(array[0] * 255).astype(np.uint8))
    latents = pipe("Fox", output_type="latent", generator=seeded(5)).images
    assert torch.equal(latents, eager("Fox", output_type="latent", generator=seeded(5)).images)
    assert isinstance(pipe("Fox", return_dict=False), tuple)
    with pytest.raises(CallError, match="output_type"):
        pipe("Fox", output_type="jpeg")


def test_latents_are_those_of_their_own_call(pipe, monkeypatch):
    """Also where another thread's call follows at once."""
    want = pipe("Fox", output_type="latent", generator=seeded(5)).images
    lock, others = pipe.executor._lock, iter(["Cat"])

    class Followed:
        acquire = staticmethod(lock.acquire)

        @staticmethod
        def release():
            lock.release()
            for prompt in others:
                pipe(prompt)

    monkeypatch.setattr(pipe.executor, "_lock", Followed)
    assert torch.equal(want, pipe("Fox", output_type="latent", generator=seeded(5)).images)


@pytest.mark.parametrize(
    ("args", "keywords", "message"),
    [
        ((), {}, "prompt: give one"),
        ((["a", "b", "c"],), {}, r"batch of prompts 3(.|\n)*The bundle has"),
        (("a",), {"height": 512}, "height=512"),
        (("a",), {"num_inference_steps": 50}, "num_inference_steps=50"),
        (("a",), {"strenght": 0.5}, "strenght: .* was not compiled with this keyword"),
        (("a",), {"guidance_scale": 1.0}, "turns guidance off"),
        (("a",), {"guidance_scale": [7.5]}, r"guidance_scale: \[7\.5\] is no number"),
        (("a",), {"timesteps": np.arange(900)}, r"timesteps=\[0, 1, 2, 3, 4, 5, \.\.\.\]"),
        (("a",), {"ip_adapter_image": np.zeros((8, 8, 3))}, "ip_adapter_image=.*The bundle has"),
        (("a",), {"callback_on_step_end_tensor_inputs": ["prompt_embeds"]}, "latents only"),
        ((7,), {}, "prompt"),
        (("a",), {"negative_prompt": ["x", "y"]}, "negative_prompt: 2 prompts"),
    ],
)
def test_what_no_variant_has_is_refused_in_words(pipe, args, keywords, message):
    with pytest.raises(CallError, match=message):
        pipe(*args, **keywords)


def test_call_errors_are_value_errors_too(pipe):
    with pytest.raises(ValueError):
        pipe("a", height=512)


def test_a_second_thread_waits_for_its_turn(pipe):
    """A service's second request is not refused while the first is drawn."""
    alone = [pipe(prompt, generator=torch.Generator().manual_seed(1), output_type="pt").images for prompt in "ab"]
    inside, found = threading.Event(), {}

    def first(*_):
        inside.set()
        time.sleep(0.05)
        return {}

    def run(prompt, **keywords):
        generator = torch.Generator().manual_seed(1)
        found[prompt] = pipe(prompt, generator=generator, output_type="pt", **keywords).images

    threads = [threading.Thread(target=run, args=("a",), kwargs={"callback_on_step_end": first})]
    threads[0].start()
    assert inside.wait(60)
    threads += [threading.Thread(target=run, args=("b",))]
    threads[1].start()
    for thread in threads:
        thread.join()
    assert torch.equal(found["a"], alone[0])
    assert torch.equal(found["b"], alone[1])


def test_a_call_within_its_own_call_is_refused_at_once(pipe):
    with pytest.raises(CallError, match="called within its own call"):
        pipe("a", callback_on_step_end=lambda *_: pipe("b"))
    assert pipe("a")


def test_a_second_thread_that_waits_too_long_is_told_to_load_its_own(pipe):
    pipe.executor.patience = 0.05
    errors = []

    def other(*_):
        def run():
            try:
                pipe("b")
            except CallError as error:
                errors.append(str(error))

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        return {}

    pipe("a", callback_on_step_end=other)
    assert "another thread" in errors[0]


def test_an_error_in_the_callback_leaves_the_pipeline_usable(pipe, eager):
    def fail(*_):
        raise KeyError("mine")

    with pytest.raises(KeyError):
        pipe("a", callback_on_step_end=fail)
    want, got = both(pipe, eager, "A red Fox")
    assert torch.equal(want, got)


@pytest.mark.parametrize("output_type", ["jpeg", None])
def test_an_unknown_output_type_is_refused_before_anything_is_drawn(pipe, monkeypatch, output_type):
    monkeypatch.setattr(pipe, "executor", None)
    with pytest.raises(CallError, match=f"output_type: {output_type!r} is none of pil, np, pt, latent"):
        pipe("a red fox", output_type=output_type)
