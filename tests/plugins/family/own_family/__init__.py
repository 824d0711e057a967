"""A family of another distribution: a pipeline of its own, at a fixed length, and an architecture by a name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from diffkiln.families import Family
from diffkiln.models.known_parts import Architecture, t5_tokenizer
from diffkiln.record.patches import Padding, Patch, resized


def _encode_prompt(self: Any, *args: Any, **kwargs: Any) -> tuple[torch.Tensor | None, ...]:
    """Zeros where the pipeline cuts."""
    embeds, mask, negative, negative_mask = super(type(self), self).encode_prompt(*args, **kwargs)
    masks = [each for each in (mask, negative_mask) if each is not None]
    longest = torch.cat(masks).sum(dim=1).max()
    within = torch.arange(mask.shape[1], device=mask.device) < longest
    cut = [embeds.masked_fill(~within.unsqueeze(-1), 0.0), mask.masked_fill(~within, 0)]
    if negative is not None:
        cut += [negative.masked_fill(~within.unsqueeze(-1), 0.0), negative_mask.masked_fill(~within, 0)]
    return (*cut, None, None)[:4]


def _paddings(_pipe: Any, fixed: Mapping[str, Any]) -> dict[str, Padding]:
    """The denoiser follows the prompt's length."""
    length = fixed["max_sequence_length"]

    def pad(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        names = "encoder_hidden_states", "encoder_attention_mask"
        return args, kwargs | {name: resized(kwargs[name], length) for name in names}

    return {"transformer": Padding(pad)}


PLUGIN = Family(
    patches=(Patch({"encode_prompt": "f14a9c47fc2c830f"}, _encode_prompt, known_in="OwnPipeline", paddings=_paddings),),
    architectures={"own-1.0": Architecture("OwnPipeline", "float32", {"tokenizer": t5_tokenizer()}, {})},
    pipelines=("own_family.pipeline:OwnPipeline",),
)
