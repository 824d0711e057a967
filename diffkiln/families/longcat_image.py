"""LongCat-Image: what a prompt quotes is tokenized by itself, character by character, out of tokens in Python lists; a
language model may rewrite the prompt before."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import functional

from diffkiln.errors import RecordError
from diffkiln.families import Family
from diffkiln.record.patches import Padding, Patch
from diffkiln.record.text import Ruled


def _rewire_prompt(_self: Any, *_args: Any, **_kwargs: Any) -> list[str]:
    raise RecordError(
        "LongCatImagePipeline has a language model write the prompt anew, word by word, which is no straight line of "
        'operations. Set "enable_prompt_rewrite" to false in inputs.call, and rewrite prompts before they are given to '
        "the bundle"
    )


def _encode_prompt(self: Any, prompt: list[str]) -> torch.Tensor:
    """Returns the same tokens between the same template; the runtime splits the prompt."""
    first, last, given = _in_template(self, prompt, self.prompt_template_encode_prefix, cut=True)
    hidden = self.text_encoder(**given, output_hidden_states=True).hidden_states[-1]
    return hidden[:, first.shape[1] : -last.shape[1]]


def _encode_prompt_and_image(self: Any, prompt: list[str], image: Any) -> torch.Tensor:
    """Does the same behind an image, which the text encoder sees. Of several prompts diffusers takes the first."""
    seen = self.image_processor_vl(images=image, return_tensors="pt")
    grids = _grids(seen["image_grid_thw"])
    count = math.prod(math.prod(grid) for grid in grids) // self.image_processor_vl.merge_size**2
    before = self.prompt_template_encode_prefix.replace(self.image_token, self.image_token * count)
    first, last, given = _in_template(self, prompt[:1], before, cut=False)  # diffusers fails where it would cut
    hidden = self.text_encoder(
        **given, pixel_values=seen["pixel_values"], image_grid_thw=grids, output_hidden_states=True
    ).hidden_states[-1]
    start = first[0].tolist().index(self.tokenizer.convert_tokens_to_ids("<|vision_start|>"))
    return hidden[:, start : -last.shape[1]]


def _in_template(
    pipe: Any, prompt: list[str], before: str, *, cut: bool
) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """Returns the tokens before and after the prompts, int64 [prompts, tokens], and what the text encoder is given."""
    options = {"add_special_tokens": False, "return_tensors": "pt"}
    tokens = pipe.tokenizer(
        [Ruled(text, quotations="characters") for text in prompt],
        padding="max_length",
        max_length=pipe.tokenizer_max_length,
        truncation=cut,
        **options,
    )
    template = before, pipe.prompt_template_encode_suffix
    first, last = (pipe.tokenizer(text, **options).input_ids.expand(len(prompt), -1) for text in template)
    ids = torch.cat([first, tokens.input_ids, last], dim=-1)
    mask = functional.pad(tokens.attention_mask, (first.shape[1], last.shape[1]), value=1)
    return first, last, {"input_ids": ids, "attention_mask": mask}


def _grids(grid: torch.Tensor) -> tuple[tuple[int, ...], ...]:
    """Returns the frames, rows and columns of patches of each image as numbers, which no request changes."""
    return tuple(tuple(each) for each in grid.tolist())


def _paddings(_pipe: Any, _fixed: Mapping[str, Any]) -> dict[str, Padding]:
    """Returns that of the text encoder, which the program gives the grids of patches as numbers."""

    def pad(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, kwargs | {"image_grid_thw": _grids(kwargs["image_grid_thw"])}

    return {"text_encoder": Padding(pad)}


PLUGIN = Family(
    patches=(
        Patch({"_encode_prompt": "7b1f1a32a185f50e"}, _encode_prompt, known_in="LongCatImagePipeline"),
        Patch(
            {"_encode_prompt": "4fb59f26ecae3afb"},
            _encode_prompt_and_image,
            known_in="LongCatImageEditPipeline",
            paddings=_paddings,
        ),
        Patch({"rewire_prompt": "868c97cb0badeb95"}, _rewire_prompt, known_in="LongCatImagePipeline", refuses=True),
    ),
)
