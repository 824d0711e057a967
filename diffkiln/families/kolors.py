"""Kolors: its tokenizer, ChatGLM's, is SentencePiece's own and written in Python; the runtime's library reads the same
file. The model itself reads from its mask whether anything is padded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from diffkiln.errors import RecordError
from diffkiln.families import Family
from diffkiln.record.patches import Patch

#: SentencePiece's kinds of models.
_UNIGRAM, _BPE = 1, 2


def _chat_glm(tokenizer: Any) -> Any:
    """Returns ChatGLM's tokenizer as one of the tokenizers library.

    Raises:
        RecordError: its file is of a kind that is not known.
    """
    from tokenizers import Tokenizer, models, processors
    from transformers.convert_slow_tokenizer import SpmConverter
    from transformers.tokenization_utils_base import generate_merges

    class Converter(SpmConverter):
        handle_byte_fallback = True

        def tokenizer(self, proto: Any) -> Tokenizer:
            pieces, kind = self.vocab(proto), proto.trainer_spec.model_type
            if kind == _UNIGRAM:
                return Tokenizer(models.Unigram(pieces, unk_id=self.unk_id(proto), byte_fallback=True))
            if kind != _BPE:
                raise RecordError("ChatGLM's tokenizer is neither a unigram model nor one of pairs of bytes")
            vocabulary = {piece: index for index, (piece, _) in enumerate(pieces)}
            merges = generate_merges(vocabulary, dict(pieces))
            unknown = proto.trainer_spec.unk_piece
            return Tokenizer(models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))

        def post_processor(self) -> Any:
            begins = [(token, self.original_tokenizer.get_command(token)) for token in ("[gMASK]", "sop")]
            return processors.TemplateProcessing(single="[gMASK] sop $A", special_tokens=begins)

    return Converter(tokenizer).converted()


def _forward(original: Callable[..., Any]) -> Callable[..., Any]:
    """Gives ChatGLM the mask of a padded prompt also where nothing is padded, which it would find out by reading it."""

    def forward(self: Any, input_ids: Any, *args: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
        given = args or kwargs.get("full_attention_mask") is not None or kwargs.get("past_key_values")
        if given or attention_mask is None:
            return original(self, input_ids, *args, attention_mask=attention_mask, **kwargs)
        rows, tokens = input_ids.shape
        full = torch.ones(rows, tokens, tokens, device=input_ids.device).tril() * attention_mask.unsqueeze(1)
        full = (full - (attention_mask.unsqueeze(-1) - 1) < 0.5).unsqueeze(1)
        return original(self, input_ids, attention_mask=attention_mask, full_attention_mask=full, **kwargs)

    return forward


PLUGIN = Family(
    patches=(
        Patch(
            {"forward": "213885f8185127ee", "get_masks": "17dcf81e7d471e5c"},
            _forward,
            known_in="ChatGLMModel",
            around=True,
        ),
    ),
    tokenizers={"ChatGLMTokenizer": _chat_glm},
)
