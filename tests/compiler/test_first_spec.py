"""`diffkiln init`: a first spec for a model, which `check` accepts."""

from __future__ import annotations

import json
import shutil

import pytest

import diffkiln
from diffkiln.cli import main
from diffkiln.compiler.first_spec import Wishes, first_spec, write_spec
from diffkiln.errors import SourceError, SpecError
from diffkiln.spec import GPUS
from tests.conftest import DIGITS
from tests.hub.conftest import contents, hub
from tests.hub.server import Server
from tests.pipelines import FAMILIES, WARNING_FILTERS, build_folder
from tests.pipelines.inputs import INPUTS

__all__ = ["hub"]

pytestmark = [pytest.mark.filterwarnings(text) for text in WARNING_FILTERS]
MODEL = DIGITS / "model"


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_the_spec_of_every_family_is_legal(name, families, tmp_path):
    made = first_spec(str(build_folder(name, families)), tmp_path / "spec.json")
    if "use_resolution_binning" in FAMILIES[name].call:  # into resolutions of which the tiny model's is none
        made.spec["inputs"]["call"] = {"use_resolution_binning": False}
    write_spec(made.spec, tmp_path / "spec.json")
    checked = diffkiln.check(tmp_path / "spec.json")
    assert [target.name for target in checked.targets] == ["cpu-x86-64-v3"]


def test_a_command_writes_it_and_says_what_comes_next(tmp_path, capsys):
    output = tmp_path / "spec.json"
    command = ["init", str(MODEL), "-o", str(output), "--height", "32", "--width", "64", "--steps", "8"]
    assert main(command) == 0
    told = capsys.readouterr()
    assert told.out.strip() == str(output)
    assert f"next: diffkiln check {output}" in told.err
    assert "64 × 32 pixels, 8 steps" in told.err
    spec = json.loads(output.read_text())
    assert spec["inputs"] == {"height": 32, "width": 64, "num_inference_steps": 8, "guidance_scale": 3.5}
    assert [step["name"] for step in spec["passes"]] == ["fuse_qkv", "compile"]
    assert main(["check", str(output)]) == 0
    assert main(command) == 2
    assert "--force" in capsys.readouterr().err
    assert main([*command, "--force"]) == 0


def test_a_folder_is_named_relative_to_the_spec(tmp_path):
    shutil.copytree(MODEL, tmp_path / "models" / "digits")
    (tmp_path / "specs").mkdir()
    made = first_spec(str(tmp_path / "models" / "digits"), tmp_path / "specs" / "spec.json")
    assert made.spec["source"] == {"model": "../models/digits"}


def test_weights_are_not_needed(tmp_path):
    bare = shutil.copytree(MODEL, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    assert first_spec(str(bare), tmp_path / "spec.json").spec["passes"]


def test_a_gpu_gets_its_type_and_one_that_is_too_small_offloads(tmp_path, monkeypatch):
    wishes = Wishes(targets=["nvidia-l4", "RTX 4090"])
    made = first_spec(str(MODEL), tmp_path / "spec.json", wishes=wishes)
    assert made.spec["target"] == [{"device": "cuda", "gpu": "nvidia-l4"}, {"device": "cuda", "gpu": "nvidia-rtx-4090"}]
    assert made.spec["source"]["dtype"] == "bfloat16"
    assert "runtime" not in made.spec
    monkeypatch.setattr("diffkiln.compiler.first_spec._SHARE", 1e-6)
    assert "offload" in first_spec(str(MODEL), tmp_path / "spec.json", wishes=wishes).spec["runtime"]
    old = Wishes(targets=["nvidia-t4"])
    assert first_spec(str(MODEL), tmp_path / "spec.json", wishes=old).spec["source"]["dtype"] == "float16"


def test_this_machines_gpu_is_the_target(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda _: "NVIDIA GeForce RTX 4090")
    made = first_spec(str(MODEL), tmp_path / "spec.json")
    assert made.spec["target"] == {"device": "cuda", "gpu": GPUS["nvidia-rtx-4090"].name}


def test_a_pipeline_that_starts_from_an_image_says_so(tmp_path):
    made = first_spec(str(MODEL), tmp_path / "spec.json", wishes=Wishes(pipeline="FluxImg2ImgPipeline"))
    assert made.spec["inputs"]["call"] == {"image": {}}
    assert made.spec["source"]["pipeline"] == "FluxImg2ImgPipeline"
    assert any("image" in notice for notice in made.notices)
    write_spec(made.spec, tmp_path / "spec.json")
    diffkiln.check(tmp_path / "spec.json")


def test_a_video_has_the_frames_that_are_asked_for(families, tmp_path):
    made = first_spec(str(build_folder("wan", families)), tmp_path / "spec.json", wishes=Wishes(frames=9))
    assert made.spec["inputs"]["num_frames"] == 9
    assert any("9 frames" in notice for notice in made.notices)


@pytest.mark.parametrize("option", ["--frames", "--height"])
def test_a_size_that_the_pipeline_does_not_take_is_refused(option, families, tmp_path, capsys):
    model = MODEL
    if option == "--height":
        model = families / "dit"
        INPUTS["dit"].build().save_pretrained(model)
    assert main(["init", str(model), "-o", str(tmp_path / "spec.json"), option, "16"]) == 2
    assert f"Leave {option} out" in capsys.readouterr().err
    assert not (tmp_path / "spec.json").exists()


def test_a_repository_is_pinned_and_only_its_configuration_is_fetched(hub: Server, tmp_path, capsys):
    commit = hub.publish("me/digits", contents(MODEL))
    output = tmp_path / "spec.json"
    assert main(["init", "me/digits", "-o", str(output), "--height", "32", "--width", "32"]) == 0
    assert json.loads(output.read_text())["source"] == {"model": "me/digits", "revision": commit}
    assert not hub.asked_for(".safetensors")
    assert main(["check", str(output)]) == 0
    assert hub.asked_for(".safetensors")


def test_what_is_not_there_is_refused(hub: Server, tmp_path, capsys):
    for model in ("me/nothing", "nowhere", str(DIGITS / "spec.json"), str(DIGITS)):
        with pytest.raises(SourceError) as caught:
            first_spec(model, tmp_path / "spec.json")
        assert caught.value.problems[0].hint
    hub.publish("me/notes", {"notes.txt": b"no model"})
    with pytest.raises(SourceError, match=r"me/notes is not a diffusers pipeline"):
        first_spec("me/notes", tmp_path / "spec.json")


def test_an_unknown_target_is_refused_with_the_nearest(tmp_path):
    with pytest.raises(SpecError, match=r"nvidia-h200"):
        first_spec(str(MODEL), tmp_path / "spec.json", wishes=Wishes(targets=["nvidia-h201"]))


def test_a_spec_is_not_written_where_it_cannot_be(tmp_path):
    with pytest.raises(SpecError, match="cannot be written"):
        write_spec({}, tmp_path / "nowhere" / "spec.json")
