"""Qwen-Image-Edit: the text encoder sees images before the prompt, and no prompt is cut, so that one that is too long
for the fixed length is refused."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from diffkiln.errors import DataDependent, RecordError
from diffkiln.families.qwen_image import vision
from diffkiln.record.patches import Padding, Patch, resized


def _encode_prompt(pictures: Callable[[int], str]) -> Callable[..., Any]:
    """Takes the place of the pipelines' own, where `pictures` gives what stands before a prompt for so many images."""

    def encode_prompt(
        self: Any,
        prompt: Any,
        image: Any = None,
        device: Any = None,
        num_images_per_prompt: int = 1,
        prompt_embeds: Any = None,
        prompt_embeds_mask: Any = None,
        max_sequence_length: int = 1024,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns `max_sequence_length` tokens for a prompt and the template's end, with a mask of those that count.

        The text encoder is causal and padded on the right: no token sees the padding.
        """
        if prompt_embeds is not None or prompt_embeds_mask is not None:
            raise RecordError(f"prompt_embeds of {type(self).__name__} are not recorded")
        prompts = [prompt] if isinstance(prompt, str) else prompt
        images = image if isinstance(image, list) else [image]
        _check(self)
        seen = self.processor.image_processor(images=images, return_tensors="pt")
        grids = tuple(tuple(grid) for grid in seen["image_grid_thw"].tolist())
        before = _before(self, pictures, grids, len(prompts))
        after = self.prompt_template_encode.partition("{}")[2]
        tokenizer = self.processor.tokenizer
        tokens = tokenizer(
            [before + text + after for text in prompts],
            max_length=len(tokenizer(before).input_ids) + max_sequence_length,
            padding="max_length",
            return_tensors="pt",
        )
        hidden = self.text_encoder(
            input_ids=tokens.input_ids,
            attention_mask=tokens.attention_mask,
            pixel_values=seen["pixel_values"],
            image_grid_thw=grids,
            output_hidden_states=True,
        ).hidden_states[-1]
        start = self.prompt_template_encode_start_idx
        mask = tokens.attention_mask[:, start:]
        embeds = hidden[:, start:].masked_fill(mask.eq(0).unsqueeze(-1), 0.0).to(dtype=self.text_encoder.dtype)
        batch, length, _ = embeds.shape
        embeds = embeds.repeat(1, num_images_per_prompt, 1).view(batch * num_images_per_prompt, length, -1)
        mask = mask.repeat(1, num_images_per_prompt, 1).view(batch * num_images_per_prompt, length)
        return embeds, mask

    return encode_prompt


def _check(pipe: Any) -> None:
    tokenizer, name = pipe.processor.tokenizer, type(pipe).__name__
    if tokenizer.padding_side != "right" or tokenizer.num_special_tokens_to_add():
        raise RecordError(f"the tokenizer of {name} pads on the left or adds tokens: its length is not fixed")
    if not vision.is_replaced(pipe.text_encoder):
        raise DataDependent(f"the text encoder of {name} reads from tensors how large its images are")


def _before(pipe: Any, pictures: Callable[[int], str], grids: Sequence[tuple[int, ...]], rows: int) -> str:
    """Returns the text before each prompt, with as many tokens for each image as the text encoder makes of it."""
    each, rest = divmod(len(grids), rows)
    start, *after = (pipe.prompt_template_encode.partition("{}")[0] + pictures(each)).split(pipe.processor.image_token)
    if rest or len(after) != each:
        raise RecordError(
            f"{type(pipe).__name__} takes one image for each prompt, and is given {len(grids)} for {rows}. Say in "
            "inputs.call how many come"
        )
    if any(grid != grids[index % each] for index, grid in enumerate(grids)):
        raise RecordError(f"{type(pipe).__name__} is given images of several sizes in a batch. Give them one size")
    mark, merged = pipe.processor.image_token, pipe.processor.image_processor.merge_size**2
    counts = [math.prod(grid) // merged for grid in grids[:each]]
    return start + "".join(mark * count + text for count, text in zip(counts, after, strict=True))


def _in_template(_count: int) -> str:
    """Returns no text: Qwen-Image-Edit's image stands in its template."""
    return ""


def _numbered(count: int) -> str:
    """Returns the numbered images of Qwen-Image-Edit-Plus."""
    return "".join(f"Picture {index + 1}: <|vision_start|><|image_pad|><|vision_end|>" for index in range(count))


def _paddings(pipe: Any, fixed: Mapping[str, Any]) -> dict[str, Padding]:
    """Returns the paddings of both components, which follow the prompt's length. The images before it fix the text's
    length.
    """
    start, pad_id = pipe.prompt_template_encode_start_idx, pipe.processor.tokenizer.pad_token_id
    token, longest, text = pipe.text_encoder.config.image_token_id, fixed["max_sequence_length"], 0

    def pad_tokens(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        nonlocal text
        ids, mask = kwargs["input_ids"], kwargs["attention_mask"]
        last = int(ids[0].eq(token).nonzero().max())
        text = last + 2 + longest  # the mark of an image's end follows its last token
        return args, kwargs | {
            "input_ids": resized(ids, text, pad_id),
            "attention_mask": resized(mask, text),
            "image_grid_thw": tuple(tuple(grid) for grid in kwargs["image_grid_thw"].tolist()),
        }

    def cut_text(tensor: torch.Tensor, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        return resized(tensor, kwargs["input_ids"].shape[1]) if tensor.ndim == 3 else tensor

    def used_text(tensor: torch.Tensor, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        mask = resized(kwargs["attention_mask"], tensor.shape[1]).bool()
        return tensor[mask]

    def pad_embeds(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        embeds, mask = kwargs["encoder_hidden_states"], kwargs["encoder_hidden_states_mask"]
        if mask is None:
            mask = torch.ones(embeds.shape[:2], dtype=torch.int64)
        padded = {
            "encoder_hidden_states": resized(embeds, text - start),
            "encoder_hidden_states_mask": resized(mask, text - start),
        }
        return args, kwargs | padded

    return {
        "text_encoder": Padding(pad_tokens, cut_text, used_text),
        "transformer": Padding(pad_embeds),
    }


_SAME = {"encode_prompt": "7d52ec05ce1315e9", "_extract_masked_hidden": "c1c5a9cc25e1ed0c"}


PATCHES = (
    Patch(
        {**_SAME, "_get_qwen_prompt_embeds": "b1ad338ede568d9b"},
        _encode_prompt(_in_template),
        known_in="QwenImageEditPipeline QwenImageEditInpaintPipeline",
        paddings=_paddings,
    ),
    Patch(
        {**_SAME, "_get_qwen_prompt_embeds": "84cd669794a7bfc7"},
        _encode_prompt(_numbered),
        known_in="QwenImageEditPlusPipeline",
        paddings=_paddings,
    ),
)
