"""Each metric on pictures whose numbers are known."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from diffkiln.compiler.metrics import About, Pair
from diffkiln.errors import SourceError
from diffkiln.evaluate.choosing import metrics_of
from diffkiln.evaluate.metrics.clip_fid import distance as frechet
from diffkiln.evaluate.metrics.cmmd import distance
from diffkiln.plugins import load, plugins


def pair(difference: float = 0.0, side: int = 32, frames: int = 1) -> Pair:
    picture = torch.rand(frames, 3, side, side, generator=torch.Generator().manual_seed(0)) * 0.5
    return Pair(picture + difference, picture, "a seven")


def about(side: int = 32, frames: int = 1, **more) -> About:
    return About(side, side, frames, **more)


def test_every_metric_is_found_by_its_name():
    assert list(plugins("metrics")) == [
        "clip_fid",
        "clip_score",
        "cmmd",
        "flicker",
        "lpips",
        "ms_ssim",
        "psnr",
        "ssim",
    ]
    assert metrics_of(()).keys() == plugins("metrics").keys()


def test_psnr_is_that_of_the_definition_and_120_for_equal_pictures():
    found = load("metrics", "psnr").score([pair(0.1), pair()], about())
    assert found.each == (pytest.approx(20, abs=1e-3), 120)
    assert found.overall == pytest.approx(70, abs=1e-3)


def test_ssim_is_1_for_equal_pictures_and_less_for_others():
    same, other = (load("metrics", "ssim").score([pair(value)], about()).overall for value in (0.0, 0.3))
    assert same == pytest.approx(1)
    assert other < 0.9


def test_ms_ssim_of_large_pictures_alone():
    metric = load("metrics", "ms_ssim")
    assert "176" in metric.objection(about(175))
    assert metric.objection(about(176)) == ""
    assert metric.score([pair(side=176)], about(176)).overall == pytest.approx(1)


def test_flicker_is_of_what_changes_between_frames():
    metric, video = load("metrics", "flicker"), pair(0.25, frames=3)
    assert metric.score([video], about(frames=3)).overall == pytest.approx(0, abs=1e-6)
    blinking = video.reference + torch.tensor([0.0, 0.5, 0.0]).reshape(3, 1, 1, 1)
    assert metric.score([Pair(blinking, video.reference, "")], about(frames=3)).overall == pytest.approx(0.5)


def test_cmmd_of_equal_sets_is_0_and_of_opposite_ones_that_of_the_kernel():
    one = torch.nn.functional.normalize(torch.ones(60, 8), dim=1)
    assert distance(one, one) == pytest.approx(0, abs=1e-9)
    assert distance(one, -one) == pytest.approx(1000 * 2 * (1 - math.exp(-4 / 200)))
    assert "at least 50 pictures" in load("metrics", "cmmd").objection(about(count=49))


def test_clip_fid_is_the_distance_of_two_gaussians():
    drawn = torch.randn(4000, 3, generator=torch.Generator().manual_seed(0))
    white = torch.linalg.solve_triangular(
        torch.linalg.cholesky(drawn.T.cov()), (drawn - drawn.mean(0)).T, upper=False
    ).T
    assert frechet(white, white) == pytest.approx(0, abs=1e-3)
    # Means that are 2 apart, and standard deviations of 1 and 3 in each of three directions.
    assert frechet(white, 3 * white + torch.tensor([2.0, 0, 0])) == pytest.approx(4 + 3 * (3 - 1) ** 2, rel=1e-3)
    assert "at least 1,024 pictures" in load("metrics", "clip_fid").objection(about(count=1023))


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory) -> Path:
    """A tiny CLIP model of random weights."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    from tests.pipelines.tokenizers import clip

    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokenizer = clip()
    text = {**small, "vocab_size": len(tokenizer), "max_position_embeddings": 77}
    vision = {**small, "image_size": 32, "patch_size": 16}
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("clip")
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    pictures = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(pictures, tokenizer).save_pretrained(folder)
    return folder


def test_clip_scores_and_cmmd_with_a_local_model(clip_folder):
    with_clip = about(count=60, backbones={"clip": clip_folder})
    found = load("metrics", "clip_score").score([pair(), pair(0.2)], with_clip)
    assert all(0 <= value <= 100 for value in (*found.each, found.reference))
    assert load("metrics", "cmmd").score([pair()] * 60, with_clip).overall == pytest.approx(0, abs=1e-6)
    assert load("metrics", "cmmd").score([pair(0.5)] * 60, with_clip).overall > 0
    assert load("metrics", "clip_fid").score([pair()] * 9, with_clip).overall == pytest.approx(0, abs=1e-3)


def test_a_backbone_that_is_none(tmp_path):
    with pytest.raises(SourceError, match="is no CLIP model"):
        load("metrics", "clip_score").score([pair()], about(backbones={"clip": tmp_path}))


@pytest.fixture(scope="module")
def vgg() -> torch.nn.Sequential:
    """VGG-16's layers as torchvision has them, with random weights."""
    torch.manual_seed(0)
    layers: list[torch.nn.Module] = []
    before = 3
    for width, count in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(count):
            layers += [torch.nn.Conv2d(before, width, 3, padding=1), torch.nn.ReLU()]
            before = width
        layers.append(torch.nn.MaxPool2d(2))
    return torch.nn.Sequential(*layers)


@pytest.fixture(scope="module")
def vgg_folder(vgg, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("vgg")
    save_file({f"features.{name}": tensor for name, tensor in vgg.state_dict().items()}, folder / "model.safetensors")
    return folder


def test_lpips_is_that_of_torchmetrics(vgg, vgg_folder, monkeypatch):
    from torchmetrics.functional.image import lpips

    monkeypatch.setattr(lpips, "_get_tv_model_features", lambda *_: vgg)
    theirs = lpips._NoTrainLpips(net="vgg", pnet_rand=True)
    metric, one = load("metrics", "lpips"), pair(0.3, side=48)
    assert "--backbone vgg16=FOLDER" in metric.objection(about())
    found = metric.score([one, pair(side=48)], about(48, backbones={"vgg16": vgg_folder}))
    wanted = float(theirs(one.picture, one.reference, normalize=True))
    assert found.each == (pytest.approx(wanted, rel=1e-5), 0)
    assert wanted > 0


def test_lpips_of_other_weights(tmp_path):
    with pytest.raises(SourceError, match=r"has no model\.safetensors"):
        load("metrics", "lpips").score([pair()], about(backbones={"vgg16": tmp_path}))
    save_file({"x": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(SourceError, match=r"has no features\.0 of VGG-16"):
        load("metrics", "lpips").score([pair()], about(backbones={"vgg16": tmp_path}))
