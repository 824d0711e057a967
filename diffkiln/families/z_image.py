"""Z-Image: captions are lists of tensors as long as each prompt, which the denoiser pads to multiples of 32."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from diffkiln.errors import DataDependent, RecordError
from diffkiln.families import Family
from diffkiln.record.patches import Padding, Patch

#: diffusers' SEQ_MULTI_OF. The tokens that fill up to it are learned, and attention sees them.
_MULTIPLE = 32


class _Caption(NamedTuple):
    """One caption at the fixed length, with its type where pipelines read it."""

    embeds: torch.Tensor
    mask: torch.Tensor

    @property
    def dtype(self) -> torch.dtype:
        return self.embeds.dtype


def _encode_prompt(
    self: Any, prompt: Any, device: Any = None, prompt_embeds: Any = None, max_sequence_length: int = 512
) -> list[_Caption]:
    """Returns all tokens of each caption, with zeros in the padding, and a mask of those that count."""
    if prompt_embeds is not None:
        raise RecordError("prompt_embeds of ZImagePipeline are not recorded")
    if "controlnet" in self.components:
        raise DataDependent(
            "the control net of Z-Image takes captions as long as each prompt, and joins them with images"
        )
    return _captions(self.text_encoder, self.tokenizer, prompt, max_sequence_length)


def _get_qwen_prompt_embeds(
    text_encoder: Any, tokenizer: Any, prompt: Any, device: Any = None, max_sequence_length: int = 512
) -> list[_Caption]:
    """Returns the same for the blocks of the modular pipeline."""
    return _captions(text_encoder, tokenizer, prompt, max_sequence_length)


def _captions(text_encoder: Any, tokenizer: Any, prompt: Any, length: int) -> list[_Caption]:
    if tokenizer.padding_side != "right":
        raise RecordError("the tokenizer of Z-Image pads on the left: where a prompt begins is not fixed")
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True, enable_thinking=True
        )
        for text in ([prompt] if isinstance(prompt, str) else prompt)
    ]
    tokens = tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    mask = tokens.attention_mask.bool()
    embeds = text_encoder(input_ids=tokens.input_ids, attention_mask=mask, output_hidden_states=True).hidden_states[-2]
    embeds = embeds.masked_fill(~mask.unsqueeze(-1), 0.0)
    return list(map(_Caption, embeds.unbind(0), mask.unbind(0)))


def _forward(
    self: Any,
    x: list[torch.Tensor],
    t: torch.Tensor,
    cap_feats: list[_Caption],
    return_dict: bool = True,
    controlnet_block_samples: Any = None,
    siglip_feats: Any = None,
    image_noise_mask: Any = None,
    patch_size: int = 2,
    f_patch_size: int = 1,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> Any:
    """Makes all captions as long as the longest possible one, and hides the rest from attention.

    Attention knows places by their rotary embeddings alone, so a token's index does not matter.
    """
    if controlnet_block_samples or siglip_feats or image_noise_mask or joint_attention_kwargs:
        raise RecordError("of the arguments of ZImageTransformer2DModel only images, times and captions are recorded")
    name = f"{patch_size}-{f_patch_size}"
    temb = self.t_embedder(t * self.t_scale).type_as(x[0])

    caption = torch.stack([embeds for embeds, _ in cap_feats])
    caption = functional.pad(caption, (0, 0, 0, -caption.shape[1] % _MULTIPLE))
    batch, text, _ = caption.shape
    lengths = torch.stack([mask.sum() for _, mask in cap_feats]).unsqueeze(-1)
    ends = (lengths + (_MULTIPLE - 1)).floor_divide(_MULTIPLE) * _MULTIPLE
    positions = torch.arange(text, device=lengths.device).expand(batch, text)
    seen = positions < ends

    patches = [self._patchify_image(image, patch_size, f_patch_size) for image in x]
    grid, sizes = patches[0][2], [size for _, size, _ in patches]
    image = torch.stack([patch for patch, _, _ in patches])
    filling = -image.shape[1] % _MULTIPLE
    image = functional.pad(self.all_x_embedder[name](image), (0, 0, 0, filling))
    is_filling = torch.arange(image.shape[1], device=image.device) >= image.shape[1] - filling
    image = torch.where(is_filling.unsqueeze(-1), self.x_pad_token, image)
    in_image = _rotary(self, _image_ids(self, ends, grid, filling))
    for layer in self.noise_refiner:
        image = layer(image, None, in_image, temb)

    caption = self.cap_embedder(caption)
    caption = torch.where((positions >= lengths).unsqueeze(-1), self.cap_pad_token, caption)
    zeros = torch.zeros_like(positions)
    in_caption = _rotary(self, torch.stack([positions + 1, zeros, zeros], dim=-1))
    for layer in self.context_refiner:
        caption = layer(caption, seen, in_caption)

    tokens = image.shape[1]
    joint = torch.cat([image, caption], dim=1)
    rotary = torch.cat([in_image, in_caption], dim=1)
    mask = torch.cat([seen.new_ones(batch, tokens), seen], dim=1)
    for layer in self.layers:
        joint = layer(joint, mask, rotary, temb)

    image = self.all_final_layer[name](joint[:, :tokens], c=temb)
    images = self.unpatchify(list(image.unbind(dim=0)), sizes, patch_size, f_patch_size)
    if not return_dict:
        return (images,)
    from diffusers.models.modeling_outputs import Transformer2DModelOutput

    return Transformer2DModelOutput(sample=images)


def _image_ids(model: Any, ends: torch.Tensor, grid: tuple[int, int, int], filling: int) -> torch.Tensor:
    """Returns [batch, tokens, 3]: the end of the caption, and the place in the image; zeros for tokens that fill up."""
    positions = model.create_coordinate_grid(size=grid, device=ends.device).flatten(0, 2).to(ends.dtype)
    first = (ends + 1).unsqueeze(-1) + positions[:, :1]
    ids = torch.cat([first, positions[:, 1:].expand(ends.shape[0], -1, -1)], dim=-1)
    return functional.pad(ids, (0, 0, 0, filling))


def _rotary(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model.rope_embedder(ids.flatten(0, 1)).unflatten(0, ids.shape[:2])


def _paddings(pipe: Any, fixed: Mapping[str, Any]) -> dict[str, Padding]:
    """Returns the padding of the denoiser's captions, which follow the prompt's length."""
    length = fixed["max_sequence_length"]

    def padded(caption: torch.Tensor) -> _Caption:
        count = caption.shape[0]
        return _Caption(functional.pad(caption, (0, 0, 0, length - count)), torch.arange(length) < count)

    def pad(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if "cap_feats" in kwargs:  # as blocks call it
            return args, kwargs | {"cap_feats": list(map(padded, kwargs["cap_feats"]))}
        images, times, captions = args
        return (images, times, list(map(padded, captions))), kwargs

    return {"transformer": Padding(pad)}


PLUGIN = Family(
    patches=(
        Patch(
            {"_encode_prompt": "0669068957634578"},
            _encode_prompt,
            known_in="ZImagePipeline ZImageImg2ImgPipeline ZImageInpaintPipeline",
            uncounted=True,
            paddings=_paddings,
        ),
        Patch(
            {"get_qwen_prompt_embeds": "0b5d34007b8f510f"},
            _get_qwen_prompt_embeds,
            known_in="ZImageTextEncoderStep",
            function=True,
            uncounted=True,
            paddings=_paddings,
        ),
        Patch(
            {
                "forward": "7352e03dea17a586",
                "patchify_and_embed": "d5796688c8f8e7e4",
                "_pad_with_ids": "b5b26db059c9e092",
                "_prepare_sequence": "4b8e049bc6b1363c",
                "_build_unified_sequence": "52566d9000f5116e",
            },
            _forward,
            known_in="ZImageTransformer2DModel",
            uncounted=True,
        ),
    ),
)
