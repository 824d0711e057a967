"""Kolors: its tokenizer, ChatGLM's, is SentencePiece's own and written in Python; the runtime's library reads the same
file."""

from __future__ import annotations

from typing import Any

from diffkiln.errors import RecordError
from diffkiln.families import Family

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


PLUGIN = Family(tokenizers={"ChatGLMTokenizer": _chat_glm})
