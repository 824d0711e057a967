"""What stands in for the parts of a model that configuration does not give: tokenizers and random weights.

A stand-in tokenizer follows the rules of the real one (case, white space, special tokens) and has as many tokens, with
the special ones at the true ids. Only its merges are few: characters and some frequent words, so that a prompt becomes
more tokens than it would.
"""

from __future__ import annotations

import hashlib
import os
import string
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TEXT = (
    "the of and to in is with on for by at from as that this an two three one over under near "
    "photo painting drawing portrait style light dark color red green blue white black gold small large old young "
    "cat dog bird fox horse tree forest river lake mountain city street house sky sea night morning sunset "
    "man woman child people detailed quality high beautiful"
)
#: Words that a stand-in has as one token each.
WORDS = _TEXT.split()

_CLIP_SIZE = 49408
_T5_SIZE = 32100  # with the 100 extra ids; the embedding has 28 rows more


def clip_tokenizer(pad_token: str, model_max_length: int) -> PreTrainedTokenizerBase:
    """Returns a lower-casing byte-level BPE tokenizer with 49 408 tokens; start and end of text are the last two."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    alphabet = sorted(ByteLevel.alphabet())  # "!", SDXL's second padding, comes first: id 0
    joined = merges((*word[:-1], word[-1] + "</w>") for word in WORDS)
    tokens = [*alphabet, *(char + "</w>" for char in alphabet), *map("".join, joined)]
    vocab = {token: i for i, token in enumerate(filled(tokens, _CLIP_SIZE - 2))}
    for token in ("<|startoftext|>", "<|endoftext|>"):
        vocab[token] = len(vocab)
    return CLIPTokenizer(
        vocab=vocab,
        merges=joined,  # pyright: ignore[reportArgumentType]  (pairs are what the backend takes)
        pad_token=pad_token,
        model_max_length=model_max_length,
    )


def t5_tokenizer(extra_ids: int, model_max_length: int) -> PreTrainedTokenizerBase:
    """Returns a Unigram tokenizer with `▁` before words; `<pad>`, `</s>` and `<unk>` are 0, 1 and 2, the extra ids
    last.
    """
    from transformers import T5Tokenizer

    chars = [char for char in string.printable if char.isprintable() and char != " "]
    scores = {"<pad>": 0.0, "</s>": 0.0, "<unk>": 0.0, "▁": -2.0}
    scores |= dict.fromkeys(chars, -6.0)
    scores |= {"▁" + word: -3.0 - rank / 64 for rank, word in enumerate(WORDS)}
    pieces = [(token, scores.get(token, -100.0)) for token in filled(scores, _T5_SIZE - extra_ids)]
    extra = [f"<extra_id_{i}>" for i in reversed(range(extra_ids))]
    pieces += [(token, 0.0) for token in extra]
    return T5Tokenizer(vocab=pieces, extra_ids=extra_ids, model_max_length=model_max_length)


def merges(words: Iterable[tuple[str, ...]]) -> list[tuple[str, str]]:
    """Returns what joins each word from left to right, each pair once."""
    pairs: dict[tuple[str, str], None] = {}
    for first, *rest in words:
        for char in rest:
            pairs[first, char] = None
            first += char
    return list(pairs)


def filled(tokens: Iterable[str], size: int) -> Iterator[str]:
    """Gives the tokens without repeats, and tokens that no text can give, up to `size`."""
    unique = dict.fromkeys(tokens)
    yield from unique
    yield from (f"\N{REPLACEMENT CHARACTER}{number}" for number in range(len(unique), size))


@torch.no_grad()
def fill_with_noise(module: nn.Module, seed: str) -> None:
    """Draws every parameter that has data, so that activations stay near unit scale and no gate is shut.

    Matrices and kernels have the variance 1 / fan-in, tables the variance 1; norms are near one and biases near zero.
    `seed` and a tensor's name seed its generator, so threads may draw in any order.
    """
    jobs: dict[int, tuple[nn.Parameter, str, float, float]] = {}
    for path, part in module.named_modules():
        for key, parameter in part.named_parameters(recurse=False):
            if parameter.is_meta:
                continue
            mean, deviation = _distribution(part, key, parameter)
            jobs.setdefault(id(parameter), (parameter, f"{seed}/{path}.{key}", mean, deviation))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(_draw, jobs.values()))


def _distribution(part: nn.Module, key: str, parameter: nn.Parameter) -> tuple[float, float]:
    if isinstance(part, nn.Embedding):
        return 0.0, 1.0
    fan_in = parameter[0].numel() if parameter.ndim else 1
    if fan_in > 1:
        return 0.0, fan_in**-0.5
    return (1.0 if key == "weight" else 0.0), 0.1


def _draw(job: tuple[nn.Parameter, str, float, float]) -> None:
    parameter, name, mean, deviation = job
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little", signed=True)
    with torch.no_grad():
        parameter.normal_(mean, deviation, generator=torch.Generator().manual_seed(seed))
