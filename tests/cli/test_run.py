"""`diffkiln run`: its options, what it writes, and what it refuses before it loads."""

from __future__ import annotations

import json

import av
import numpy as np
import pytest
from PIL import Image

import diffkiln
from diffkiln.bundle import open_bundle
from diffkiln.cli import main
from tests.end_to_end.test_families import spec_of
from tests.pipelines import WARNING_FILTERS

pytestmark = [pytest.mark.filterwarnings(text) for text in WARNING_FILTERS]


@pytest.fixture(scope="module")
def batch(tmp_path_factory):
    """Stable Diffusion for two prompts, whose steps can be called with other keywords; nothing is compiled."""
    made = spec_of("sd", tmp_path_factory.mktemp("sd"))
    made["inputs"] |= {"batch_size": 2}
    return diffkiln.compile(made, tmp_path_factory.mktemp("bundle") / "sd").path


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    made = spec_of("wan", tmp_path_factory.mktemp("wan"))
    return diffkiln.compile(made, tmp_path_factory.mktemp("bundle") / "wan").path


@pytest.fixture
def run(tmp_path, capsys):
    """Runs a bundle; gives the exit code and what went to the standard error."""

    def call(bundle, *arguments: str, output: str = "out.png", prompts: int = 1):
        command = ["run", str(bundle), *["--prompt", "a seven"] * prompts, "--seed", "7", "-o", str(tmp_path / output)]
        code = main([*command, *arguments])
        return code, capsys.readouterr().err

    return call


def test_steps_are_shown_as_they_pass(digits_bundle, run):
    code, error = run(digits_bundle)
    assert code == 0
    assert [line for line in error.splitlines() if line.startswith("step")] == [f"step {n} of 8" for n in range(1, 9)]


def test_steps_are_shown_as_diffusers_too(digits_bundle, run):
    code, error = run(digits_bundle, "--as-diffusers")
    assert code == 0
    assert "step 8 of 8" in error
    assert "it/s" not in error  # diffusers' own bar


def test_a_batch_gives_numbered_files(batch, run, tmp_path):
    assert run(batch, prompts=2, output="fox.webp")[0] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fox-0.webp", "fox-1.webp"]


def test_an_array_holds_the_numbers_of_the_call(batch, run, tmp_path):
    assert run(batch, prompts=2, output="fox.npy")[0] == 0
    made = np.load(tmp_path / "fox.npy")
    assert made.dtype == np.float32
    assert made.shape[0] == 2
    assert made.shape[-1] == 3


def test_videos_are_written(film, run, tmp_path):
    assert run(film, "--fps", "5", output="fox.mp4")[0] == 0
    with av.open(str(tmp_path / "fox.mp4")) as container:
        stream = container.streams.video[0]
        frames = sum(1 for _ in container.decode(stream))
    assert stream.average_rate == 5
    assert run(film, output="fox.gif")[0] == 0
    with Image.open(tmp_path / "fox.gif") as moving:
        assert moving.n_frames == frames


@pytest.mark.parametrize(
    ("name", "words"),
    [("fox.xyz", ".xyz is not an ending"), ("fox.mp4", "makes pictures"), ("no/fox.png", "no folder")],
)
def test_the_name_of_the_output_is_looked_at_before_anything_is_loaded(digits_bundle, run, name, words, monkeypatch):
    monkeypatch.setattr("diffkiln.runtime.loading.load", None)
    code, error = run(digits_bundle, output=name)
    assert code == 2
    assert words in error


def test_a_video_is_not_drawn_for_the_name_of_a_picture(film, run, monkeypatch):
    monkeypatch.setattr("diffkiln.runtime.loading.load", None)
    code, error = run(film, output="fox.png")
    assert code == 2
    assert "the bundle makes videos" in error


def test_any_keyword_of_the_call_can_be_set(digits_bundle, run):
    assert run(digits_bundle, "--set", "max_sequence_length=16", "--set", "prompt_2=a seven")[0] == 0
    code, error = run(digits_bundle, "--set", "max_sequence_length=32")
    assert code != 0
    assert "max_sequence_length=32" in error


def test_a_set_keyword_reaches_the_call_as_json(digits_bundle, run, monkeypatch):
    given = {}

    def load(*_, **__):
        from diffkiln.errors import CallError

        class Pipe:
            variants = ()
            bundle = open_bundle(digits_bundle)

            def __call__(self, **keywords):
                given.update(keywords)
                raise CallError("seen")

        return Pipe()

    monkeypatch.setattr("diffkiln.runtime.loading.load", load)
    settings = [
        "sigmas=[1.0, 0.5]",
        "eta=0.5",
        "joint_attention_kwargs=null",
        "prompt_2=a b",
        'prompt_3="4"',
        "on=true",
    ]
    run(digits_bundle, *[word for item in settings for word in ("--set", item)])
    wanted = {"sigmas": [1.0, 0.5], "eta": 0.5, "joint_attention_kwargs": None, "prompt_2": "a b", "prompt_3": "4"}
    assert wanted.items() <= given.items()
    assert given["on"] is True


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("eta", "'eta' is not KEYWORD=VALUE"),
        ("1a=2", "is not KEYWORD=VALUE"),
        ("sigmas=[1,", "is not valid JSON"),
        ("prompt=a cat", "Use --prompt"),
        ("output_type=np", "The ending of --output decides it"),
        ("generator=7", "Use --seed"),
        ("height=32", "height is given twice"),
    ],
)
def test_a_setting_that_will_not_do_is_refused_with_the_mend(digits_bundle, run, setting, words):
    code, error = run(digits_bundle, "--height", "32", "--set", setting)
    assert code == 2
    assert words in error


def test_a_device_is_chosen_by_name(digits_bundle, run):
    assert run(digits_bundle, "--device", "cpu")[0] == 0
    code, error = run(digits_bundle, "--device", "gpu")
    assert code == 2
    assert "'gpu' is not a device. Use cpu, cuda, or one GPU of several such as cuda:1" in error


def test_a_keyword_that_diffusers_does_not_take_is_refused_with_the_nearest(digits_bundle, run):
    code, error = run(digits_bundle, "--as-diffusers", "--set", "max_sequence_lenght=16")
    assert code == 2
    assert "max_sequence_length" in error


def test_what_compile_says_to_try_runs(tmp_path, capsys, monkeypatch):
    """From the printed command alone, in the folder where it was printed."""
    import shlex

    made = spec_of("sd", tmp_path / "model")
    (tmp_path / "spec.json").write_text(json.dumps(made))
    monkeypatch.chdir(tmp_path)
    assert main(["compile", "spec.json", "-o", "bundle"]) == 0
    told = capsys.readouterr().err
    assert "needs:    Python >=3.11, torch ==" in told
    assert "install:  pip install diffkiln" in told
    (line,) = [line for line in told.splitlines() if line.startswith("try:")]
    assert main(shlex.split(line)[2:]) == 0
    assert (tmp_path / "image.png").is_file()


def test_a_loaded_pipeline_says_what_it_is(digits_bundle):
    with diffkiln.load(digits_bundle) as pipe:
        assert repr(pipe) == "<FluxPipeline, compiled, on cpu: 32x32-8-steps>"


def test_limits_and_paranoia_are_options(batch, run):
    code, error = run(batch, "--paranoid", "--limit", "text_chars=3", prompts=2)
    assert code == 6
    assert "text_chars is 7, and 3 is allowed" in error
    assert run(batch, "--paranoid", "--limit", "text_chars=30", prompts=2)[0] == 0
    assert run(batch, "--limit", "words=3")[0] == 2
    assert run(batch, "--limit", "tokens=few")[0] == 2


@pytest.fixture
def overflowing(batch, monkeypatch):
    """A bundle whose VAE is given numbers that overflow."""
    from diffkiln.runtime.executor import Executor

    component = Executor.component

    def loud(self, name, program):
        made = component(self, name, program)
        if name != "vae":
            return made
        return type(
            "Loud", (), {"schedule": made.schedule, "__call__": lambda _, *given: made(*[1e38 * x for x in given])}
        )()

    monkeypatch.setattr(Executor, "component", loud)
    return batch


def test_a_picture_of_overflow_is_not_written(overflowing, run, tmp_path):
    code, error = run(overflowing, prompts=2)
    assert code == 7
    assert "vae: its output" in error
    assert "--allow-nan" in error
    assert list(tmp_path.iterdir()) == []
    assert run(overflowing, "--allow-nan", prompts=2)[0] == 0
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("name", ["fox.png", "fox.npy"])
def test_neither_is_one_of_diffusers(batch, run, tmp_path, monkeypatch, name):
    from diffusers import AutoencoderKL

    decode = AutoencoderKL.decode
    monkeypatch.setattr(AutoencoderKL, "decode", lambda self, z, *rest, **more: decode(self, z * 1e38, *rest, **more))
    code, error = run(batch, "--as-diffusers", prompts=2, output=name)
    assert code == 7
    assert "not finite" in error
    assert list(tmp_path.iterdir()) == []
    assert run(batch, "--as-diffusers", "--allow-nan", prompts=2, output=name)[0] == 0
