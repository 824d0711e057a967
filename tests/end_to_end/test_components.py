"""Components from elsewhere, bags of models, variants and components that are left out: bundles equal diffusers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from tests.end_to_end.compared import built, differences, spec_of
from tests.pipelines import WARNING_FILTERS, build_folder

pytestmark = [pytest.mark.filterwarnings(line) for line in WARNING_FILTERS]

SIZE = {"height": 64, "width": 64}


@pytest.fixture(scope="module")
def models(families):
    """Where the tiny pipelines are."""
    build_folder("sd", families)
    return families


def controlnets(unet, count: int = 2) -> list[diffusers.ControlNetModel]:
    """ControlNets whose outputs are not zero, as those of untrained ones are."""
    nets = []
    for seed in range(count):
        torch.manual_seed(seed)
        net = diffusers.ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 8, 8, 16))
        for part in (net.controlnet_down_blocks, net.controlnet_mid_block, net.controlnet_cond_embedding.conv_out):
            for weight in part.parameters():
                torch.nn.init.normal_(weight, std=0.1)
        nets.append(net)
    return nets


def images(count: int = 2) -> list[Image.Image]:
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 255, (64, 64, 3), dtype=np.uint8)) for _ in range(count)]


@pytest.fixture(scope="module")
def several(models, tmp_path_factory):
    """A pipeline with two ControlNets, as diffusers saves it."""
    base = diffusers.StableDiffusionPipeline.from_pretrained(models / "sd")
    parts = {**base.components, "controlnet": controlnets(base.unet)}
    folder = tmp_path_factory.mktemp("several") / "model"
    diffusers.StableDiffusionControlNetPipeline(**parts, requires_safety_checker=False).save_pretrained(str(folder))
    return folder


CONTROLLED = {"image": [SIZE, SIZE], "controlnet_conditioning_scale": [0.7, 0.5]}


def test_several_controlnets_are_one_component(several, tmp_path):
    spec = spec_of({"model": "model"}, call=CONTROLLED)
    bundle = built(spec, several.parent, tmp_path / "bundle")
    assert (bundle / "pipeline" / "controlnet_1" / "config.json").is_file()
    eager = diffusers.DiffusionPipeline.from_pretrained(several)
    found = differences(bundle, eager, image=images(), controlnet_conditioning_scale=[0.7, 0.5])
    assert max(found) < 1e-5


def test_a_list_of_models_makes_one_component_of_several(models, several, tmp_path):
    given = [{"model": str(several / "controlnet")}, {"model": str(several / "controlnet_1")}]
    source = {"model": "sd", "pipeline": "StableDiffusionControlNetPipeline", "components": {"controlnet": given}}
    bundle = built(spec_of(source, call=CONTROLLED), models, tmp_path / "bundle")
    eager = diffusers.DiffusionPipeline.from_pretrained(several)
    found = differences(bundle, eager, image=images(), controlnet_conditioning_scale=[0.7, 0.5])
    assert max(found) < 1e-5


def test_several_adapters_are_one_component(models, tmp_path):
    base = diffusers.StableDiffusionPipeline.from_pretrained(models / "sd")
    adapters = []
    for seed in range(2):
        torch.manual_seed(seed)
        adapters.append(diffusers.T2IAdapter(in_channels=3, channels=(16, 32), num_res_blocks=1, downscale_factor=8))
    parts = {name: part for name, part in base.components.items() if name != "image_encoder"}
    pipe = diffusers.StableDiffusionAdapterPipeline(**parts, adapter=adapters, requires_safety_checker=False)
    pipe.save_pretrained(str(tmp_path / "model"))
    assert (tmp_path / "model" / "adapter_1").is_dir()
    call = {"image": [SIZE, SIZE], "adapter_conditioning_scale": [0.7, 0.5]}
    bundle = built(spec_of({"model": "model"}, call=call), tmp_path, tmp_path / "bundle")
    eager = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "model")
    found = differences(bundle, eager, image=images(), adapter_conditioning_scale=[0.7, 0.5])
    assert max(found) < 1e-5


def test_a_replaced_component_is_that_of_another_model(models, tmp_path):
    torch.manual_seed(5)
    config = diffusers.AutoencoderKL.load_config(models / "sd" / "vae")
    diffusers.AutoencoderKL.from_config(config).save_pretrained(tmp_path / "other")
    spec = spec_of({"model": "sd", "components": {"vae": {"model": str(tmp_path / "other")}}})
    bundle = built(spec, models, tmp_path / "bundle")
    vae = diffusers.AutoencoderKL.from_pretrained(tmp_path / "other")
    eager = diffusers.DiffusionPipeline.from_pretrained(models / "sd", vae=vae)
    assert max(differences(bundle, eager)) < 1e-5
    plain = diffusers.DiffusionPipeline.from_pretrained(models / "sd")
    assert max(differences(bundle, plain)) > 1e-3
    told = json.loads((bundle / "spec.json").read_text())["source"]["components"]["vae"]
    assert set(told) == {"digest"}
    assert str(tmp_path) not in (bundle / "spec.json").read_text() + (bundle / "manifest.json").read_text()


def test_a_component_of_another_class_and_another_scheduler(models, tmp_path):
    torch.manual_seed(5)
    tiny = diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8, 8),
        num_encoder_blocks=(1, 1, 1, 1), num_decoder_blocks=(1, 1, 1, 1),
    )  # fmt: skip
    tiny.save_pretrained(tmp_path / "tiny")
    diffusers.EulerDiscreteScheduler(steps_offset=1).save_pretrained(tmp_path / "euler")
    parts = {"vae": {"model": "tiny"}, "scheduler": {"model": "euler"}}
    bundle = built(spec_of({"model": str(models / "sd"), "components": parts}), tmp_path, tmp_path / "bundle")
    scheduler = diffusers.EulerDiscreteScheduler.from_pretrained(tmp_path / "euler")
    eager = diffusers.DiffusionPipeline.from_pretrained(
        models / "sd", vae=diffusers.AutoencoderTiny.from_pretrained(tmp_path / "tiny"), scheduler=scheduler
    )
    assert max(differences(bundle, eager)) < 1e-5


def test_a_component_that_is_null_is_left_out(families, tmp_path):
    folder = build_folder("sd3", families)
    spec = spec_of({"model": folder.name, "components": {"text_encoder_3": None, "tokenizer_3": None}})
    bundle = built(spec, folder.parent, tmp_path / "bundle")
    eager = diffusers.DiffusionPipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)
    assert max(differences(bundle, eager)) < 1e-5
    assert not (bundle / "weights" / "text_encoder_3").exists()
    told = json.loads((bundle / "spec.json").read_text())["source"]["components"]
    assert told == {"text_encoder_3": None, "tokenizer_3": None}


def test_a_variant_is_read_where_a_component_has_it(models, tmp_path):
    folder = Path(shutil.copytree(models / "sd", tmp_path / "model"))
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    torch.manual_seed(5)
    for weight in pipe.unet.parameters():
        torch.nn.init.normal_(weight, std=0.05)
    pipe.unet.save_pretrained(folder / "unet", variant="fp16")
    pipe.text_encoder.save_pretrained(folder / "text_encoder", variant="fp16")
    (folder / "text_encoder" / "model.safetensors").unlink()
    bundle = built(spec_of({"model": "model", "variant": "fp16"}), tmp_path, tmp_path / "bundle")
    eager = diffusers.DiffusionPipeline.from_pretrained(folder, variant="fp16")
    assert max(differences(bundle, eager)) < 1e-5
    assert max(differences(bundle, diffusers.DiffusionPipeline.from_pretrained(models / "sd"))) > 1e-3
