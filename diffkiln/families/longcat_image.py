"""LongCat-Image: what a prompt quotes is tokenized by itself, character by character, out of tokens in Python lists; a
language model may rewrite the prompt before."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from diffkiln.errors import RecordError
from diffkiln.families import Family
from diffkiln.record.patches import Patch
from diffkiln.record.text import Ruled


def _rewire_prompt(_self: Any, *_args: Any, **_kwargs: Any) -> list[str]:
    raise RecordError(
        "LongCatImagePipeline has a language model write the prompt anew, word by word, which is no straight line of "
        'operations. Set "enable_prompt_rewrite" to false in inputs.call, and rewrite prompts before they are given to '
        "the bundle"
    )


def _encode_prompt(self: Any, prompt: list[str]) -> torch.Tensor:
    """Returns the same tokens between the same template; the runtime splits the prompt."""
    options = {"add_special_tokens": False, "return_tensors": "pt"}
    tokens = self.tokenizer(
        [Ruled(text, quotations="characters") for text in prompt],
        padding="max_length",
        max_length=self.tokenizer_max_length,
        truncation=True,
        **options,
    )
    template = self.prompt_template_encode_prefix, self.prompt_template_encode_suffix
    first, last = (self.tokenizer(text, **options).input_ids.expand(len(prompt), -1) for text in template)
    ids = torch.cat([first, tokens.input_ids, last], dim=-1)
    mask = functional.pad(tokens.attention_mask, (first.shape[1], last.shape[1]), value=1)
    hidden = self.text_encoder(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[-1]
    return hidden[:, first.shape[1] : -last.shape[1]]


PLUGIN = Family(
    patches=(
        Patch({"_encode_prompt": "7b1f1a32a185f50e"}, _encode_prompt, known_in="LongCatImagePipeline"),
        Patch({"rewire_prompt": "868c97cb0badeb95"}, _rewire_prompt, known_in="LongCatImagePipeline", refuses=True),
    ),
)
