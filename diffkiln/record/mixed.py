"""What processors of texts and images do with tokens, as operations on tensors: transformers does it with lists."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from unittest import mock

import torch

#: Compares the marks of images in a text with those among its tokens. A prompt holds none, which the runtime sees to.
_CHECK = "_check_special_mm_tokens"
#: Says of each token whether it stands for an image, a video or sound.
_TYPES = "create_mm_token_type_ids"
_KINDS = {"image_token_ids": 1, "video_token_ids": 2, "audio_token_ids": 3}


@contextlib.contextmanager
def mixed_processors(parts: Iterable[Any], is_marked: Callable[[Any], bool]) -> Iterator[None]:
    """Lets processors take tokens that depend on the request, inside the `with` block.

    Args:
        parts: of a pipeline.
        is_marked: tells such tokens.
    """
    from transformers import ProcessorMixin

    def types(processor: Any, ids: Any) -> Any:
        return _types(processor, ids) if is_marked(ids) else original(processor, ids)

    original = ProcessorMixin.create_mm_token_type_ids
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(ProcessorMixin, _TYPES, types))
        for kind in {type(part) for part in parts if hasattr(part, _CHECK)}:
            stack.enter_context(mock.patch.object(kind, _CHECK, return_value=None))
        yield


def _types(processor: Any, ids: torch.Tensor) -> torch.Tensor:
    found = torch.zeros_like(ids)
    for name, value in _KINDS.items():
        for token in getattr(processor, name):
            if token is not None:
                found = found.masked_fill(ids == token, value)
    return found
