"""The calls that a recorded program is compared with its pipeline on: prompts, scales, latents, and images of noise."""

from __future__ import annotations

import hashlib
import logging
from bisect import bisect_left
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image

from diffkiln.errors import CallError, VerifyError
from diffkiln.interpreter.dtypes import dtype_of
from diffkiln.program import Program
from diffkiln.program.calls import GIVEN, Given
from diffkiln.program.text_rules import COUNTED, form_of
from diffkiln.record.call import Request
from diffkiln.record.keywords import NEGATIVES, PROMPTS, parameters_of
from diffkiln.runtime.text import TextEnd

_LONG = " ".join(f"word{index} of a Prompt, longer than any TEXT encoder reads &amp; cut" for index in range(120))
#: Words, of one token in most vocabularies, by which a prompt becomes as long as it must be.
_FILLERS = ("a", "the", "1", ",", "of")
#: One token, a usual one with what transforms touch, and one that is cut, or of which as much is given as fits.
TEXTS = ("a", "  A red   Fox; &lt;b&gt; \u201cjumps\u201d over schÃ¶n snow\n", _LONG)


@contextmanager
def cuts_unheard() -> Iterator[None]:
    """Hides the warnings of prompts that are cut, inside the `with` block: these are cut on purpose."""
    logger = logging.getLogger("diffkiln.runtime.text")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


class Lengths:
    """The prompts that programs take: none that is too long, and where lengths are fixed those of that length.

    Args:
        end: turns prompts into tokens.
        programs: of one variant.
    """

    def __init__(self, end: TextEnd, programs: Mapping[str, Program]) -> None:
        self._end = end
        self._fitted: dict[tuple[str, str], str] = {}
        self._texts = [text for program in programs.values() for text in program.texts]

    def shortened(self, text: str, suffix: str) -> str:
        """Returns as many of the text's words as every prompt may have, with the suffix behind them."""
        words = text.split(" ")
        while len(words) > 1 and not self._is_taken(" ".join(words) + suffix):
            words.pop()
        return " ".join(words)

    def _is_taken(self, prompt: str) -> bool:
        rows = [row for text in self._texts for row in text["rows"] if "keyword" in row]
        count = max((each["index"] for each in rows), default=0) + 1
        prompts = {row["keyword"]: [self.formed(row["keyword"], prompt)] * count for row in rows}
        try:
            with cuts_unheard():
                self._encode(prompts)
        except CallError:
            return False
        return True

    def _encode(self, prompts: Mapping[str, list[str]]) -> None:
        for text in self._texts:
            if COUNTED not in text:
                self._end.encode(text, prompts)
            self._end.miscounted(text, prompts)

    def formed(self, keyword: str, text: str) -> str:
        """Returns the text, as a prompt of the form that the programs take."""
        forms = (form_of(each, keyword) for each in self._texts)
        form = next((form for form in forms if form is not None), None)
        return form.made_of(text) if form else text

    def fitted(self, keyword: str, prompt: str) -> str:
        """Returns the prompt, with words taken from it or added to it so that it has as many tokens as it must have.

        Raises:
            VerifyError: there is none.
        """
        if (keyword, prompt) not in self._fitted:
            self._fitted[keyword, prompt] = self._filled(keyword, prompt)
        return self._fitted[keyword, prompt]

    def _filled(self, keyword: str, prompt: str) -> str:
        own = self._of(keyword)
        if not own or not any(self._missing(own, prompt)):
            return prompt
        words = prompt.split()
        longest = bisect_left(range(len(words) + 1), True, key=lambda kept: self._is_long(own, words[:kept])) - 1
        for kept in range(longest, -1, -1):
            missing = max(self._missing(own, " ".join(words[:kept])))
            for filler in _FILLERS:
                filled = " ".join([*words[:kept], *[filler] * missing])
                if not any(self._missing(own, filled)):
                    return filled
        raise VerifyError(f"no {keyword} was found that has the tokens of its variant, so it cannot be verified")

    def _of(self, keyword: str) -> list[Mapping[str, Any]]:
        """Returns the texts of fixed lengths that hold this prompt, or that stands for it where it is not given."""
        base = NEGATIVES[0] if keyword in NEGATIVES else PROMPTS[0]
        kinds = (*NEGATIVES, *PROMPTS)
        same = {each for each in kinds if (each in NEGATIVES) == (keyword in NEGATIVES)}
        alike = {keyword} | (same if keyword == base else set())
        return [
            {**text, "rows": [row], COUNTED: [count], "around": [around]}
            for text in self._texts
            if COUNTED in text
            for row, count, around in zip(text["rows"], text[COUNTED], text["around"], strict=True)
            if row.get("keyword") in alike
        ]

    def _is_long(self, texts: Sequence[Mapping[str, Any]], words: Sequence[str]) -> bool:
        return min(self._missing(texts, " ".join(words))) < 0

    def _missing(self, texts: Sequence[Mapping[str, Any]], prompt: str) -> list[int]:
        """Returns how many tokens the prompt has too few, or too many below zero, for each of the texts."""
        found = []
        for text in texts:
            row = text["rows"][0]
            miscount = self._end.miscounted(text, {row["keyword"]: [prompt] * (row["index"] + 1)})
            found.append(miscount.wanted - miscount.found if miscount else 0)
        return found


def cases_of(
    programs: Mapping[str, Program], request: Request, lengths: Lengths
) -> Iterator[tuple[dict[str, Any], int]]:
    """Yields keywords of calls to compare, and a seed for each.

    Args:
        programs: of one variant.
        request: what they were recorded for.
        lengths: which prompts the programs take.
    """
    texts = [lengths.shortened(text, str(request.batch_size)) for text in TEXTS]
    for case, (keywords, seed) in enumerate(_prompted(programs, request, texts, lengths)):
        yield keywords | _images(programs["call"], request, case) | _tensors(request, case), seed


def example_of(pipe: Any, request: Request, negative: bool) -> dict[str, Any]:
    """Returns the keywords of one call of the original pipeline.

    Args:
        pipe: the pipeline.
        request: what is fixed, and what else it takes.
        negative: give negative prompts, too.
    """
    parameters = parameters_of(pipe)
    row = [TEXTS[0]] * request.batch_size
    given: dict[str, Any] = {
        keyword: row[0] if len(row) == 1 else list(row) for keyword in request.prompts(parameters, negative)
    }
    given |= dict(request.fixed) | _pictures(request, 1, set(request.images)) | _tensors(request, 0)
    if "generator" in parameters:
        given["generator"] = torch.Generator().manual_seed(0)
    return given


def _prompted(
    programs: Mapping[str, Program], request: Request, texts: Sequence[str], lengths: Lengths
) -> Iterator[tuple[dict[str, Any], int]]:
    call = programs["call"]
    always = [keyword for keyword in ("prompt", *request.texts) if _asks_for(call, keyword)]
    needed = [keyword for keyword in NEGATIVES[:1] if _asks_for(call, keyword)]

    def given(text: str, keyword: str) -> dict[str, Any]:
        rows = [f"{text}{index}" for index in range(request.batch_size)]
        rows = [text] if request.batch_size == 1 else rows
        rows = [lengths.fitted(keyword, lengths.formed(keyword, row)) for row in rows]
        return {keyword: rows[0] if request.batch_size == 1 else rows}

    def prompts(text: str) -> dict[str, Any]:
        found = {key: value for word in always for key, value in given(text, word).items()}
        return found | {key: value for word in needed for key, value in given("blurred", word).items()}

    for seed, text in enumerate(texts):
        yield prompts(text), seed
    if any(item.source.get("kind") == "scalar" for item in call.inputs):
        yield prompts(texts[1]) | {"guidance_scale": request.fixed["guidance_scale"] * 1.5 + 0.25}, 3
    second = [keyword for keyword in PROMPTS[1:] if _asks_for(call, keyword)]
    if second:
        yield prompts(texts[1]) | {key: value for word in second for key, value in given("other", word).items()}, 4
    if negative := programs.get(Given(negative=True).name, call if needed else None):
        words = [keyword for keyword in NEGATIVES[:1] if _asks_for(negative, keyword)]
        for seed, text in enumerate(texts, 5):
            yield prompts(texts[1]) | {key: value for word in words for key, value in given(text, word).items()}, seed
    for name, choice in GIVEN.items():
        if choice.latents and name in programs:
            (item,) = [item for item in programs[name].inputs if item.source.get("keyword") == "latents"]
            more = given("blurred", "negative_prompt") if choice.negative else {}
            yield prompts(texts[1]) | more | {"latents": noise_like(item.type, name.encode())}, 8


def _asks_for(program: Program, keyword: str) -> bool:
    return any(row.get("keyword") == keyword for text in program.texts for row in text["rows"])


def _images(call: Program, request: Request, seed: int) -> dict[str, Any]:
    """Returns images by keyword: of the recorded size, or of another size if any will do."""
    return _pictures(request, seed, {item.source["keyword"] for item in call.inputs if item.source.get("size")})


def _pictures(request: Request, seed: int, looked_at: Collection[str]) -> dict[str, Any]:
    """Returns images by keyword; those of the keywords in `looked_at` have the recorded size."""
    rng = np.random.default_rng(seed)

    def image(keyword: str, size: tuple[int, int]) -> Image.Image:
        width, height = size if keyword in looked_at or seed % 2 else (size[0] + 13 * seed, size[1] + 7)
        return Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))

    def given(keyword: str, sizes: Any) -> Any:
        if sizes is None or isinstance(sizes[0], int):
            return None if sizes is None else image(keyword, sizes)
        return [given(keyword, size) for size in sizes]

    return {keyword: given(keyword, sizes) for keyword, sizes in request.images.items()}


def _tensors(request: Request, case: int) -> dict[str, Any]:
    """Returns tensors of noise by keyword, of the types that the caller's have."""

    def noise(keyword: str, types: Any, suffix: str = "") -> Any:
        if isinstance(types, tuple):
            return [noise(keyword, each, f"{suffix}/{index}") for index, each in enumerate(types)]
        return noise_like(types, f"{keyword}{suffix}/{case}".encode())

    return {keyword: noise(keyword, types) for keyword, types in request.tensors.items()}


def noise_like(type_: Any, seed: bytes) -> torch.Tensor:
    """Returns a tensor of this type that depends on the seed: normal numbers, or small whole ones."""
    number = int.from_bytes(hashlib.blake2b(seed, digest_size=7).digest(), "big")
    generator = torch.Generator().manual_seed(number)
    dtype = dtype_of(type_.dtype)
    if dtype.is_floating_point:
        return torch.randn(type_.shape, generator=generator).to(dtype)
    return torch.randint(0, 2, type_.shape, generator=generator).to(dtype)
