"""Names of tensors in the files of LoRA adapters: which layer each is of, and what of it."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

#: How the names of tensors begin in the formats of trainers, and the text encoder that they are of.
ENCODERS = {
    "lora_te_": "text_encoder", "lora_te1_": "text_encoder", "lora_te2_": "text_encoder_2",
    "lora_te3_": "text_encoder_3", "text_encoders.clip_l.": "text_encoder", "text_encoders.clip_g.": "text_encoder_2",
    "text_encoders.t5xxl.": "text_encoder_3",
}  # fmt: skip
#: Names of the two factors of a layer's change, in the formats that diffusers reads; the rank is a dimension of each.
RANK_FIRST, RANK_SECOND = re.compile(r"lora_A|lora_down|[._]down\b"), re.compile(r"lora_B|lora_up|[._]up\b")

#: What a tensor is: the factor that comes first, the one that comes second, an addition to the bias, or a number.
Kind = Literal["down", "up", "bias", "alpha"]

_UNDERSCORED = {"lora_unet_": "", "lora_transformer_": ""} | {
    begin: owner for begin, owner in ENCODERS.items() if begin.endswith("_")
}
#: What trainers put before the names of the denoiser's layers.
_AROUND = ("base_model.model.", "diffusion_model.")
_ENDS: tuple[tuple[re.Pattern[str], Kind], ...] = (
    (re.compile(r"\.(?:lora_A(?:\.\w+)?|lora_down|lora\.down|lora_linear_layer\.down)\.weight"), "down"),
    (re.compile(r"\.(?:lora_B(?:\.\w+)?|lora_up|lora\.up|lora_linear_layer\.up)\.weight"), "up"),
    (re.compile(r"\.lora_B(?:\.\w+)?\.bias"), "bias"),
    (re.compile(r"(?:\.lora|\.lora_linear_layer)?\.alpha"), "alpha"),
)
#: diffusers' first format, in which the processor of an attention held the factors.
_PROCESSOR = re.compile(r"(?P<attention>.+)\.processor\.(?P<layer>to_[qkv]|to_out)_lora\.(?P<kind>down|up)\.weight")
#: What other methods than LoRA call their tensors.
_METHODS = {
    "lora_magnitude_vector": "DoRA", "dora_scale": "DoRA", "lokr_": "LoKr", "hada_": "LoHa", "lora_mid": "LoCon's CP",
    "lora_embedding_": "embeddings", ".oft_": "OFT", ".diff": "differences of whole weights",
}  # fmt: skip


@dataclass(frozen=True)
class Named:
    """The parts of a tensor's name.

    Attributes:
        owner: The component; empty where the name does not say it.
        layer: The layer's name; with underscores in the place of dots where `underscored`.
        kind: What of the layer's change it is.
    """

    owner: str
    layer: str
    kind: Kind
    underscored: bool = False


def parse(key: str, components: Collection[str]) -> Named | None:
    """Returns what the name of a tensor says; None if it is in no format of diffusers, PEFT or kohya's scripts.

    Args:
        key: The tensor's name.
        components: Names of the pipeline's components.
    """
    for begin, owner in _UNDERSCORED.items():
        if key.startswith(begin) and (split := _split(key.removeprefix(begin))):
            return Named(owner, *split, underscored=True)
    for begin in _AROUND:
        key = key.removeprefix(begin)
    first, _, rest = key.partition(".")
    owner, name = (first, rest) if first in components else ("", key)
    if found := _PROCESSOR.fullmatch(name):
        layer = "to_out.0" if found["layer"] == "to_out" else found["layer"]
        return Named(owner, f"{found['attention']}.{layer}", "down" if found["kind"] == "down" else "up")
    split = _split(name)
    return Named(owner, *split) if split else None


def other_method(key: str) -> str:
    """Returns the method, other than LoRA, that a tensor of this name is of; empty if its name is of none known."""
    return next((method for word, method in _METHODS.items() if word in key), "")


def _split(name: str) -> tuple[str, Kind] | None:
    for pattern, kind in _ENDS:
        if (found := pattern.search(name)) and found.end() == len(name) and found.start() > 0:
            return name[: found.start()], kind
    return None
