"""The calls that a recorded program is compared with its pipeline on: prompts, scales, latents, and images of noise."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from diffkiln.interpreter.dtypes import dtype_of
from diffkiln.program import Program
from diffkiln.program.calls import GIVEN, Given
from diffkiln.record.call import NEGATIVES, PROMPTS, Request

_LONG = " ".join(f"word{index} of a Prompt, longer than any TEXT encoder reads &amp; cut" for index in range(120))
#: One token, a usual one with what transforms touch, and one that is cut, or of which as much is given as fits.
TEXTS = ("a", "  A red   Fox; &lt;b&gt; \u201cjumps\u201d over schÃ¶n snow\n", _LONG)


def cases_of(
    programs: Mapping[str, Program], request: Request, fits: Callable[[str], bool]
) -> Iterator[tuple[dict[str, Any], int]]:
    """Keywords of calls to compare, and a seed for each.

    Args:
        programs: of one variant.
        request: what they were recorded for.
        fits: whether the programs take a prompt, and do not refuse it as too long.
    """
    texts = [_shortened(text, lambda given: fits(f"{given}{request.batch_size}")) for text in TEXTS]
    for case, (keywords, seed) in enumerate(_prompted(programs, request, texts)):
        yield keywords | _images(programs["call"], request, case), seed


def _shortened(text: str, fits: Callable[[str], bool]) -> str:
    """As many of its words as fit."""
    words = text.split(" ")
    while len(words) > 1 and not fits(" ".join(words)):
        words.pop()
    return " ".join(words)


def _prompted(
    programs: Mapping[str, Program], request: Request, texts: Sequence[str]
) -> Iterator[tuple[dict[str, Any], int]]:
    call = programs["call"]

    def prompts(text: str, keyword: str = "prompt") -> dict[str, Any]:
        rows = [f"{text}{index}" for index in range(request.batch_size)]
        return {keyword: text if request.batch_size == 1 else rows}

    for seed, text in enumerate(texts):
        yield prompts(text), seed
    if any(item.source.get("kind") == "scalar" for item in call.inputs):
        yield prompts(texts[1]) | {"guidance_scale": request.fixed["guidance_scale"] * 1.5 + 0.25}, 3
    second = [keyword for keyword in PROMPTS[1:] if _asks_for(call, keyword)]
    if second:
        yield prompts(texts[1]) | {key: value for word in second for key, value in prompts("other", word).items()}, 4
    if negative := programs.get(Given(negative=True).name):
        words = [keyword for keyword in NEGATIVES[:1] if _asks_for(negative, keyword)]
        for seed, text in enumerate(texts, 5):
            yield prompts(texts[1]) | {key: value for word in words for key, value in prompts(text, word).items()}, seed
    for name, given in GIVEN.items():
        if given.latents and name in programs:
            (item,) = [item for item in programs[name].inputs if item.source.get("keyword") == "latents"]
            more = prompts("blurred", "negative_prompt") if given.negative else {}
            yield prompts(texts[1]) | more | {"latents": noise_like(item.type, name.encode())}, 8


def _asks_for(program: Program, keyword: str) -> bool:
    return any(row.get("keyword") == keyword for text in program.texts for row in text["rows"])


def _images(call: Program, request: Request, seed: int) -> dict[str, Any]:
    """Keyword → images as a caller may give them: of the recorded size, or of another where any will do."""
    looked_at = {item.source["keyword"] for item in call.inputs if item.source.get("size")}
    rng = np.random.default_rng(seed)

    def image(keyword: str, size: tuple[int, int]) -> Image.Image:
        width, height = size if keyword in looked_at or seed % 2 else (size[0] + 13 * seed, size[1] + 7)
        return Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))

    found: dict[str, Any] = {}
    for keyword, sizes in request.images.items():
        one = isinstance(sizes[0], int)
        found[keyword] = image(keyword, sizes) if one else [image(keyword, size) for size in sizes]  # type: ignore
    return found


def noise_like(type_: Any, seed: bytes) -> torch.Tensor:
    """A tensor of this type that depends on the seed: normal numbers, or small whole ones."""
    number = int.from_bytes(hashlib.blake2b(seed, digest_size=7).digest(), "big")
    generator = torch.Generator().manual_seed(number)
    dtype = dtype_of(type_.dtype)
    if dtype.is_floating_point:
        return torch.randn(type_.shape, generator=generator).to(dtype)
    return torch.randint(0, 2, type_.shape, generator=generator).to(dtype)
