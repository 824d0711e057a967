"""A pipeline whose shapes follow the prompt."""

from typing import Any

from diffusers import PixArtSigmaPipeline


class OwnPipeline(PixArtSigmaPipeline):
    """PixArt-Sigma, with prompts cut to the longest of them."""

    def encode_prompt(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        texts = super().encode_prompt(*args, **kwargs)
        length = max(int(mask.sum(dim=1).max()) for mask in texts[1::2] if mask is not None)
        return tuple(None if text is None else text[:, :length] for text in texts)
