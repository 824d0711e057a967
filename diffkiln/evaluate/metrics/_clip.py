"""A CLIP model of transformers from a local folder."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from diffkiln.errors import SourceError
from diffkiln.interpreter.quiet import quiet_libraries


@functools.cache
def clip(folder: Path) -> tuple[Any, Any]:
    """Returns the model and its processor; nothing is downloaded.

    Raises:
        SourceError: the folder holds no CLIP model.
    """
    from transformers import CLIPModel, CLIPProcessor

    try:
        with quiet_libraries():
            model: Any = CLIPModel.from_pretrained(folder, local_files_only=True, use_safetensors=True)
            return model.eval(), CLIPProcessor.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # whatever transformers raises for a folder of something else
        reason = str(error).strip().partition("\n")[0]
        raise SourceError(f"--backbone clip: {folder} is no CLIP model that transformers loads: {reason}") from error


def embedded(pictures: Sequence[torch.Tensor], folder: Path) -> torch.Tensor:
    """Returns one vector of length 1 for each picture: [pictures, features].

    Args:
        pictures: float32 [frames, 3, height, width], 0 to 1; the middle frame counts.
        folder: of the CLIP model.
    """
    model, processor = clip(folder)
    rows = []
    with torch.inference_mode(), quiet_libraries():
        for picture in pictures:
            frame = picture[len(picture) // 2].permute(1, 2, 0).clamp(0, 1).numpy()
            options = {"do_rescale": False, "return_tensors": "pt", "input_data_format": "channels_last"}
            given = processor.image_processor(frame, **options)
            rows.append(_vector(model.get_image_features(**given)))
    return torch.nn.functional.normalize(torch.cat(rows), dim=-1)


def embedded_texts(texts: Sequence[str], folder: Path) -> torch.Tensor:
    """Returns one vector of length 1 for each text, which is cut where the model reads no further."""
    model, processor = clip(folder)
    longest = model.config.text_config.max_position_embeddings
    with torch.inference_mode(), quiet_libraries():
        given = processor.tokenizer(list(texts), return_tensors="pt", padding=True, truncation=True, max_length=longest)
        found = model.get_text_features(input_ids=given["input_ids"], attention_mask=given["attention_mask"])
    return torch.nn.functional.normalize(_vector(found), dim=-1)


def _vector(found: Any) -> torch.Tensor:
    """Returns the features; transformers 5 wraps them."""
    return found if isinstance(found, torch.Tensor) else found.pooler_output
