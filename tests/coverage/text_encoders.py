"""Text encoders of transformers, compiled whole, as pipelines call them: token ids and a mask of their padding."""

from __future__ import annotations

import torch
import transformers

from tests.coverage.registry import Draw, case
from tests.pipelines import parts, tokenizers

TOKENS = 12


def encoder(name: str, masked: bool = True, **call):
    """Register what builds a text encoder and gives how many words it knows."""

    def register(make):
        def made(draw: Draw, size: int):
            module, words = make()
            given = {"input_ids": draw.ids(words, 1, TOKENS * size)}
            mask = {"attention_mask": (torch.arange(TOKENS * size) < 9).long()[None]} if masked else {}
            return module, given | mask | call

        return case(name, "text encoder", "whole")(made)

    return register


DEEP = {"output_hidden_states": True, "use_cache": False}


@encoder("CLIPTextModel", masked=False, output_hidden_states=True)
def clip():
    tokenizer = tokenizers.clip()
    return parts.clip_encoder(tokenizer), len(tokenizer)


@encoder("CLIPTextModelWithProjection", masked=False, output_hidden_states=True)
def clip_projected():
    tokenizer = tokenizers.clip()
    return parts.clip_encoder(tokenizer, projection=True, act="gelu"), len(tokenizer)


@encoder("T5EncoderModel")
def t5():
    tokenizer = tokenizers.t5()
    return parts.t5_encoder(tokenizer), len(tokenizer)


@encoder("UMT5EncoderModel")
def umt5():
    tokenizer = tokenizers.t5()
    return parts.t5_encoder(tokenizer, multilingual=True), len(tokenizer)


@encoder("BertModel")
def bert():
    tokenizer = tokenizers.bert()
    return parts.bert_encoder(tokenizer), len(tokenizer)


@encoder("GemmaModel", **DEEP)
def gemma():
    tokenizer = tokenizers.gemma()
    return transformers.GemmaModel(transformers.GemmaConfig(**parts.decoder_config(tokenizer))), len(tokenizer)


@encoder("Gemma2Model", **DEEP)
def gemma2():
    tokenizer = tokenizers.gemma()
    return parts.gemma2_encoder(tokenizer), len(tokenizer)


@encoder("Gemma3TextModel", **DEEP)
def gemma3():
    tokenizer = tokenizers.gemma()
    config = transformers.Gemma3TextConfig(**parts.decoder_config(tokenizer), sliding_window=64)
    return transformers.Gemma3TextModel(config), len(tokenizer)


@encoder("LlamaModel", **DEEP)
def llama():
    tokenizer = tokenizers.qwen()
    return transformers.LlamaModel(transformers.LlamaConfig(**parts.decoder_config(tokenizer))), len(tokenizer)


@encoder("Qwen2_5_VLForConditionalGeneration", **DEEP)
def qwen25_vl():
    tokenizer = tokenizers.qwen()
    return parts.qwen25_vl_encoder(tokenizer), 64


@encoder("Qwen3Model", **DEEP)
def qwen3():
    tokenizer = tokenizers.qwen()
    return parts.qwen3_encoder(tokenizer), len(tokenizer)


@encoder("Mistral3ForConditionalGeneration", **DEEP)
def mistral3():
    tokenizer = tokenizers.qwen()
    return parts.mistral3_encoder(tokenizer), 64
