"""A tiny vision-language model with its processor, for pipelines whose images go through the text encoder."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import transformers
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase, processing_utils
from transformers.utils import is_torchvision_available
from transformers.video_processing_utils import VideoProcessorMixin

from tests.pipelines import parts, tokenizers

MARKS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
#: The most pixels that the vision tower sees of an image: five windows, of which three are cut off.
MOST_PIXELS = 28 * 28 * 24


class NoVideos(VideoProcessorMixin):
    """Stands for the processor of videos, which needs torchvision, and which no pipeline here gives one."""

    @classmethod
    def from_pretrained(cls, *_args: Any, **_kwargs: Any) -> NoVideos:
        return cls()


if not is_torchvision_available():  # transformers' own processors have all three parts, or none
    processing_utils.transformers_module.VideoProcessorMixin = VideoProcessorMixin
    import_module("transformers.models.auto.video_processing_auto").AutoVideoProcessor = NoVideos


def qwen_vl_tokenizer() -> PreTrainedTokenizerBase:
    """Qwen's with the marks of images."""
    tokenizer = tokenizers.qwen(max_length=4096)
    tokenizer.add_tokens([AddedToken(mark, special=True) for mark in MARKS], special_tokens=True)  # pyright: ignore
    return tokenizer


def qwen_vl_processor(tokenizer: PreTrainedTokenizerBase) -> Any:
    size = {"shortest_edge": 56 * 56, "longest_edge": MOST_PIXELS}
    images = transformers.Qwen2VLImageProcessor(size=size)
    videos = transformers.Qwen2VLVideoProcessor() if is_torchvision_available() else NoVideos()
    return transformers.Qwen2VLProcessor(images, tokenizer, videos)


def qwen25_vl(tokenizer: PreTrainedTokenizerBase) -> Any:
    """Qwen 2.5 VL with a vision tower of two blocks: one that attends within windows, and one to the whole image."""
    text = parts.decoder_config(tokenizer) | {
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]},
        "max_position_embeddings": 4096,
    }
    vision = {
        "depth": 2,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": parts.DIM,
        "fullatt_block_indexes": [1],
        "window_size": 56,
    }
    names = ("vision_start", "vision_end", "image", "video")
    marks = {f"{name}_token_id": tokenizer.convert_tokens_to_ids(mark) for name, mark in zip(names, MARKS, strict=True)}
    return transformers.Qwen2_5_VLForConditionalGeneration(
        transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **marks)
    )


def qwen3_vl_processor(tokenizer: PreTrainedTokenizerBase) -> Any:
    size = {"shortest_edge": 64 * 64, "longest_edge": 32 * 32 * 24}
    images = transformers.Qwen2VLImageProcessor(size=size, patch_size=16)
    videos = transformers.Qwen3VLVideoProcessor() if is_torchvision_available() else NoVideos()
    template = tokenizer.chat_template
    return transformers.Qwen3VLProcessor(images, tokenizer, videos, chat_template=template)


def qwen3_vl(tokenizer: PreTrainedTokenizerBase, *, layers: int = 2, bare: bool = False) -> Any:
    """Qwen 3 VL, or the model under its head."""
    text = parts.decoder_config(tokenizer, layers=layers) | {
        "rope_parameters": {"rope_type": "default", "mrope_section": [4, 2, 2], "mrope_interleaved": True},
        "max_position_embeddings": 4096,
    }
    tower = {"depth": 2, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": parts.DIM}
    tower |= {"deepstack_visual_indexes": [0], "num_position_embeddings": 64}
    names = ("vision_start", "vision_end", "image", "video")
    marks = {f"{name}_token_id": tokenizer.convert_tokens_to_ids(mark) for name, mark in zip(names, MARKS, strict=True)}
    kind = transformers.Qwen3VLModel if bare else transformers.Qwen3VLForConditionalGeneration
    return kind(transformers.Qwen3VLConfig(text_config=text, vision_config=tower, **marks))
