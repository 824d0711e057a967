"""Calling a loaded bundle with the keywords that people pass every day, compared with diffusers."""

from __future__ import annotations

import copy
import pickle
import threading
import time

import numpy as np
import pytest
import torch

import diffkiln
from diffkiln.errors import Busy, CallError, NotFinite
from diffkiln.interpreter.portable import portable
from diffkiln.interpreter.quiet import quiet_libraries
from diffkiln.program import CALL
from diffkiln.runtime import executor
from diffkiln.runtime.finite import outputs_of
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
    turns, others = pipe.executor.turns, iter(["Cat"])
    leave = turns._leave

    def followed(turn):
        leave(turn)
        for prompt in others:
            pipe(prompt)

    monkeypatch.setattr(turns, "_leave", followed)
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
        (("a",), {"guidance_scale": [7.5]}, r"guidance_scale: \[7\.5\] is not a number"),
        (("a",), {"timesteps": np.arange(900)}, r"timesteps=an array of int64\[900\]"),
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


@pytest.mark.parametrize("timeout", [0, 0.05])
def test_a_second_thread_that_waits_too_long_is_told_that_the_pipeline_is_busy(pipe, timeout):
    errors = []

    def run():
        try:
            pipe("b", timeout=timeout)
        except Busy as error:
            errors.append(error)

    def other(*_):
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        return {}

    pipe("a", callback_on_step_end=other)
    assert "busy with calls of other threads" in str(errors[0])
    assert (errors[0].code, errors[0].exit_code) == ("busy", 75)
    assert pipe("b", timeout=0)


def test_a_bad_call_is_refused_without_waiting(pipe):
    """What is wrong with it is known before its turn comes."""
    errors = []

    def run():
        try:
            pipe("b", height=7, timeout=None)
        except CallError as error:
            errors.append(error)

    def other(*_):
        thread = threading.Thread(target=run)
        thread.start()
        thread.join(30)
        return {}

    pipe("a", callback_on_step_end=other)
    assert "height=7" in str(errors[0])


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


# -- interrupting --


def _stop_at(number, how):
    def end(pipe, step, _timestep, values):
        if step == number:
            how(pipe)
        return values

    return end


def _by_attribute(pipe):
    pipe._interrupt = True


@pytest.mark.parametrize("step", [0, 1])
@pytest.mark.parametrize("output_type", ["pt", "latent"])
def test_interrupting_in_a_callback_skips_the_rest_as_diffusers_does(pipe, eager, step, output_type):
    def drawn(which):
        callback = _stop_at(step, _by_attribute)
        return which("Fox", output_type=output_type, generator=seeded(5), callback_on_step_end=callback).images

    want, got = drawn(eager), drawn(pipe)
    assert torch.equal(want, got)
    assert not torch.equal(got, pipe("Fox", output_type=output_type, generator=seeded(5)).images)


def test_latents_that_the_callback_changed_are_those_that_are_decoded(pipe, eager):
    def callback(which, step, _timestep, values):
        which._interrupt = step == 0
        return {"latents": values["latents"] * 0.5}

    want, got = [
        call("Fox", output_type="pt", generator=seeded(5), callback_on_step_end=callback).images
        for call in (eager, pipe)
    ]
    assert torch.equal(want, got)


def test_interrupt_ends_the_call_after_its_step_also_from_another_thread(pipe):
    seen = []

    def from_thread(which):
        thread = threading.Thread(target=lambda: seen.append(which.interrupt()))
        thread.start()
        thread.join()
        seen.append(bool(which.interrupt))

    steps = []

    def callback(which, step, timestep, values):
        steps.append(step)
        return _stop_at(0, from_thread)(which, step, timestep, values)

    assert not pipe.interrupt
    assert pipe("Fox", callback_on_step_end=callback).images
    assert (steps, seen) == ([0], [True, True])
    assert pipe.interrupt() is False
    assert pipe("Fox", callback_on_step_end=lambda *_: steps.append(9)).images
    assert steps.count(9) > 1


def test_interrupting_is_taken_back_as_in_diffusers(pipe):
    steps = []

    def callback(which, step, _timestep, values):
        which._interrupt = True
        which._interrupt = False
        steps.append(step)
        return values

    pipe("Fox", callback_on_step_end=callback)
    assert len(steps) > 1


# -- previews --


def _images(pipe, callback, **keywords):
    return pipe("Fox", output_type="pt", generator=seeded(5), callback_on_step_end=callback, **keywords).images


def test_a_preview_is_what_the_call_would_give_if_it_ended_there_and_leaves_the_call_as_it_is(pipe):
    seen = []

    def look(which, _step, _timestep, _values):
        seen.append(which.preview("pt").images)

    whole = pipe("Fox", output_type="pt", generator=seeded(5)).images
    assert torch.equal(_images(pipe, look), whole)
    assert len(seen) > 1
    for step, shown in enumerate(seen):
        assert torch.equal(shown, _images(pipe, _stop_at(step, _by_attribute)))


def test_a_preview_of_weights_that_come_and_go_leaves_the_others_in_their_order(digits_bundle):
    def drawn(pipe, callback=lambda *_: None):
        before = pipe.executor.store.brought
        made = _images(pipe, callback)
        return made, pipe.executor.store.brought - before

    with diffkiln.load(digits_bundle) as pipe:
        decoder = len(pipe.executor.component("vae", next(iter(pipe.executor.modules["vae"].programs))).schedule)
        whole, brought = drawn(pipe)
        again, more = drawn(pipe, lambda which, step, *_: which.preview() if step == 2 else None)
        assert torch.equal(whole, again)
        assert more == brought + decoder
        assert pipe.executor.store.groups_now == 0


def test_a_preview_is_refused_where_there_is_nothing_to_show(pipe):
    wrong = []

    def from_thread(which):
        def ask():
            with pytest.raises(CallError, match="ask in callback_on_step_end") as caught:
                which.preview()
            wrong.append(caught.value)

        thread = threading.Thread(target=ask)
        thread.start()
        thread.join()

    with pytest.raises(CallError, match="ask in callback_on_step_end"):
        pipe.preview()
    pipe("Fox", callback_on_step_end=_stop_at(0, from_thread))
    assert wrong
    for word, told in (("latent", "the callback is given the latents"), ("jpeg", "is none of")):
        with pytest.raises(CallError, match=told):
            pipe.preview(word)


# -- attributes --


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("scheduler", "pass `scheduler`"),
        ("load_lora_weights", "pass `fuse_lora`"),
        ("enable_model_cpu_offload", "`offload` in `runtime`"),
        ("enable_vae_tiling", "pass `vae`"),
        ("unet", "as_diffusers=True"),
    ],
)
def test_what_a_compiled_pipeline_lacks_is_refused_and_says_what_to_write(pipe, name, message):
    with pytest.raises(CallError, match=f"{name} cannot be found.*{message}"):
        getattr(pipe, name)
    assert not hasattr(pipe, name)


@pytest.mark.parametrize("name", ["scheduler", "_guidance_scale", "unet", "interrupt", "device", "whatever"])
def test_setting_what_would_be_ignored_is_refused(pipe, name):
    with pytest.raises(CallError, match=f"{name} cannot be set"):
        setattr(pipe._pipe, name, None)


def test_a_pipeline_stays_where_it_is_and_shows_no_bar(pipe):
    assert pipe.to("cpu") is pipe._pipe
    assert pipe.to(device=torch.device("cpu")).device.type == "cpu"
    pipe.set_progress_bar_config(disable=True)
    for given in (("cuda",), (torch.float16,), ("nowhere",)):
        with pytest.raises(CallError, match="to: "):
            pipe.to(*given)
    with pytest.raises(CallError, match="shows no bar"):
        pipe.set_progress_bar_config(disable=False)


@pytest.mark.parametrize("way", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_copy_is_refused_in_words(pipe, way):
    with pytest.raises(CallError, match="Send the bundle's path"):
        way(pipe._pipe)


# -- results that are no pictures --


def test_overflow_names_the_component_that_gave_it_first(pipe):
    latents = torch.full((1, *_latents_of(pipe)[1:]), 1e38)
    with pytest.raises(NotFinite, match=r"^unet: its output"):
        pipe("Fox", latents=latents)
    with pytest.raises(NotFinite, match=r"^unet: its output"):
        pipe("Fox", latents=latents, output_type="latent")
    last = []

    def end(_pipe, step, _timestep, values):
        last.append(step)
        return {"latents": values["latents"] * (1e38 if step == steps - 1 else 1)}

    pipe("Fox", callback_on_step_end=lambda _p, step, _t, values: last.append(step) or values)
    steps = len(last)
    with pytest.raises(NotFinite, match=r"^vae: its output"):
        pipe("Fox", callback_on_step_end=end)


def _latents_of(pipe):
    return pipe("Fox", output_type="latent").images.shape


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast:RuntimeWarning")  # diffusers' own
def test_allow_nan_gives_what_diffusers_gives(pipe, eager):
    latents = torch.full((1, *_latents_of(pipe)[1:]), 1e38)
    for output_type in ("np", "pil", "latent"):
        want = eager("Fox", latents=latents, output_type=output_type).images
        got = pipe("Fox", latents=latents, output_type=output_type, allow_nan=True).images
        np.testing.assert_array_equal(np.asarray(want), np.asarray(got))


def test_looking_for_overflow_costs_little(pipe, monkeypatch):
    """One reduction for each output of a component, and no more than that."""
    made = []
    monkeypatch.setattr(executor, "outputs_of", lambda name, given: made.append(name) or outputs_of(name, given))
    pipe("Fox")
    calls = [op for op in pipe.variants[0].programs["call"].ops if op.name == CALL]
    assert made == [op.attrs["component"] for op in calls]
    made.clear()
    pipe("Fox", allow_nan=True)
    assert made == []
