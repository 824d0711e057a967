"""A checkpoint in one file, of a whole pipeline or of a component: a bundle equals what from_single_file gives."""

from __future__ import annotations

import json
import shutil

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

import diffkiln
from diffkiln.errors import SourceError, SpecError
from tests.end_to_end.compared import built, differences, spec_of
from tests.pipelines import WARNING_FILTERS, build_folder
from tests.pipelines.originals import original

pytestmark = [pytest.mark.filterwarnings(line) for line in WARNING_FILTERS]


@pytest.fixture(scope="module")
def room(families, tmp_path_factory):
    """A folder with a checkpoint of other weights than the model's, and the model's configuration alone."""
    root = tmp_path_factory.mktemp("single")
    model = build_folder("sd", families)
    shutil.copytree(model, root / "config", ignore=shutil.ignore_patterns("*.safetensors"))
    shutil.copytree(model, root / "model")
    pipe = diffusers.DiffusionPipeline.from_pretrained(model)
    torch.manual_seed(3)
    for module in (pipe.unet, pipe.text_encoder, pipe.vae):
        for weight in module.parameters():
            weight.data += torch.randn_like(weight) * 0.02
    original(pipe, root / "checkpoint.safetensors")
    pipe.unet.save_pretrained(root / "unet")
    return root


def test_a_whole_pipeline_in_one_file(room, tmp_path):
    bundle = built(spec_of({"single_file": "checkpoint.safetensors", "config": "config"}), room, tmp_path / "bundle")
    eager = diffusers.StableDiffusionPipeline.from_single_file(
        str(room / "checkpoint.safetensors"), config=str(room / "config"), local_files_only=True
    )
    assert max(differences(bundle, eager)) < 1e-5
    written = json.loads((bundle / "spec.json").read_text())["source"]
    assert written["single_file"].startswith("sha256:")
    assert "config" not in written
    assert str(room) not in (bundle / "manifest.json").read_text()


def test_check_needs_no_weight_of_it(room, monkeypatch):
    def refuse(*_args, **_kwargs):
        raise AssertionError("a weight was read")

    monkeypatch.setattr("safetensors.torch.load_file", refuse)
    plan = diffkiln.check(spec_of({"single_file": "checkpoint.safetensors", "config": "config"}), base=room)
    assert set(plan.bytes_before) == {"unet", "vae", "text_encoder"}


def test_one_component_in_one_file_of_the_original_layout(room, tmp_path):
    source = {"model": "model", "components": {"unet": {"single_file": "checkpoint.safetensors"}}}
    bundle = built(spec_of(source), room, tmp_path / "bundle")
    unet = diffusers.UNet2DConditionModel.from_single_file(
        str(room / "checkpoint.safetensors"), config=str(room / "model"), subfolder="unet", local_files_only=True
    )
    eager = diffusers.DiffusionPipeline.from_pretrained(room / "model", unet=unet)
    assert max(differences(bundle, eager)) < 1e-5


def test_the_digest_follows_the_file(room, tmp_path):
    for name in ("config", "checkpoint.safetensors"):
        copy = shutil.copytree if (room / name).is_dir() else shutil.copy
        copy(room / name, tmp_path / name)
    spec = spec_of({"single_file": "checkpoint.safetensors", "config": "config"})
    before = diffkiln.check(spec, base=tmp_path).source.digest()
    state = load_file(tmp_path / "checkpoint.safetensors")
    state["first_stage_model.decoder.conv_out.bias"] += 1
    save_file(state, tmp_path / "checkpoint.safetensors")
    assert diffkiln.check(spec, base=tmp_path).source.digest() != before


def test_a_component_that_the_file_lacks_is_named_with_the_mend(room, tmp_path):
    state = load_file(room / "checkpoint.safetensors")
    save_file(
        {key: tensor for key, tensor in state.items() if "first_stage" not in key}, tmp_path / "short.safetensors"
    )
    spec = spec_of({"single_file": str(tmp_path / "short.safetensors"), "config": str(room / "config")})
    with pytest.raises(SourceError, match=r'component vae: short\.safetensors does not hold it.*"vae": {"model"'):
        diffkiln.check(spec)
    spec["source"]["components"] = {"vae": {"model": str(room / "model")}}
    assert diffkiln.check(spec).source.modules == ("text_encoder", "unet", "vae")


def test_a_file_without_a_configuration_names_the_repository_of_its_kind(room):
    with pytest.raises(SourceError, match=r"stable-diffusion-v1-5/stable-diffusion-v1-5.* needs a revision"):
        diffkiln.check(spec_of({"single_file": "checkpoint.safetensors"}), base=room)


def test_a_file_of_no_known_layout_wants_a_configuration(tmp_path):
    save_file({"some.weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(SourceError, match=r'layout of other\.safetensors is none that diffusers knows.*"config"'):
        diffkiln.check(spec_of({"single_file": "other.safetensors"}), base=tmp_path)


def test_a_pickle_is_refused(tmp_path):
    with pytest.raises(SpecError, match=r"single_file.*loading another can run code"):
        diffkiln.check(spec_of({"single_file": "model.ckpt", "config": "x"}), base=tmp_path)


def test_a_model_that_is_a_file_says_how_to_give_it(room):
    with pytest.raises(SourceError, match=r'Give it as "single_file": "checkpoint\.safetensors"'):
        diffkiln.check(spec_of({"model": "checkpoint.safetensors"}), base=room)
