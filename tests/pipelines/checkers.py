"""A tiny safety checker with its processor, which objects to some images of a pipeline without training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

_TOWER = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
SIDE = 30


def safety_checker(threshold: float = 0.5) -> Any:
    """The checker of Stable Diffusion, with random concepts."""
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker

    torch.manual_seed(0)
    vision = {**_TOWER, "image_size": SIDE, "patch_size": 6}
    config = transformers.CLIPConfig(text_config={**_TOWER, "vocab_size": 16}, vision_config=vision, projection_dim=16)
    checker = StableDiffusionSafetyChecker(config).eval()
    for embeds in (checker.concept_embeds, checker.special_care_embeds):
        torch.nn.init.normal_(embeds)
    for weights in (checker.concept_embeds_weights, checker.special_care_embeds_weights):
        torch.nn.init.constant_(weights, threshold)
    return checker


def processor() -> Any:
    return transformers.CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})


def with_checker(folder: Path, output: Path) -> Path:
    """Saves the pipeline of a folder with a safety checker."""
    import diffusers

    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    parts = {**pipe.components, "safety_checker": safety_checker(), "feature_extractor": processor()}
    type(pipe)(**parts, requires_safety_checker=True).save_pretrained(str(output))
    return output
