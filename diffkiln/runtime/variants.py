"""The variants of a bundle: which of them a call asks for, and what is said where none fits."""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diffkiln.guards.spelling import suggest
from diffkiln.program import Input, Program
from diffkiln.program.calls import text_keywords
from diffkiln.program.images import IMAGES, image_keywords
from diffkiln.program.narrowed import narrowed_of
from diffkiln.program.text_rules import COUNTED
from diffkiln.runtime.given import LATENTS, is_negative, is_prompt, tensor_inputs
from diffkiln.runtime.image_end import refusal

#: The result that says which images a safety checker objected to.
FLAGS = "nsfw_content_detected"
_MISSING = object()
#: So many variants are listed one by one in an error.
_FEW = 8
_SHOWN = {"height", "width", "num_frames", "num_inference_steps", "num_images_per_prompt"}
#: Fields of a spec's `inputs`; other keywords stand in `call`.
_OF_INPUTS = {*_SHOWN, "batch_size", "guidance_scale"}
_BATCH = "batch of prompts"
_PER_PROMPT = ("num_images_per_prompt", "num_videos_per_prompt", "num_waveforms_per_prompt")
#: Longer JSON is not shown.
_LONG = 80


@dataclass(frozen=True)
class CompiledVariant:
    """One choice of the fixed keywords: its programs by the optional keywords that a caller gives with it."""

    name: str
    fixed: Mapping[str, Any]
    programs: Mapping[str, Program]

    @property
    def batch_size(self) -> int:
        texts = (text for program in self.programs.values() for text in program.texts)
        return max((row["index"] + 1 for text in texts for row in text["rows"] if "index" in row), default=1)

    @property
    def images_per_prompt(self) -> int:
        """Returns how many images or videos a call gives for each prompt."""
        counts = (self.fixed.get(name) for name in _PER_PROMPT)
        return math.prod(count for count in counts if isinstance(count, int) and count > 0)

    @property
    def texts(self) -> list[str]:
        """Returns the keywords whose texts reach a tokenizer."""
        return text_keywords(tuple(self.programs.values()))

    @property
    def counts_tokens(self) -> bool:
        """Returns True if the prompt's number of tokens picks the variant."""
        return any(COUNTED in text for program in self.programs.values() for text in program.texts)

    @property
    def tensors(self) -> dict[str, list[Input]]:
        """Returns the keywords that take tensors; all its programs have the same, but for latents."""
        return tensor_inputs(self._inputs)

    @property
    def free(self) -> set[str]:
        """Returns the keywords that accept any value."""
        inputs = self.programs["call"].inputs
        return {item.source["keyword"] for item in inputs if item.source.get("kind") == "scalar"}

    def narrowed(self, program: Program) -> dict[int, Program]:
        """Returns the programs that do what one does, for so many adapters as their layers compute slots."""
        name = next((name for name, other in self.programs.items() if other is program), "")
        return narrowed_of(self.programs, name)

    def in_range(self, given: Mapping[str, Any]) -> bool:
        """Returns False if a value of a free keyword is one for which another program is needed."""
        scalars = (item.source for item in self.programs["call"].inputs if item.source.get("kind") == "scalar")
        bounds = {source["keyword"]: source["above"] for source in scalars if "above" in source}
        return not any(_is_number(given.get(name)) and given[name] <= bound for name, bound in bounds.items())

    @property
    def images(self) -> dict[str, int]:
        """Returns the keywords that take images, and how many each takes."""
        return image_keywords(self._inputs)

    @property
    def _inputs(self) -> list[Input]:
        """Returns the inputs of all programs: which of them runs is only known after the inputs are given."""
        return [item for program in self.programs.values() for item in program.inputs]

    def agrees(self, keyword: str, value: Any) -> bool:
        """Returns True if the variant can be called with this value."""
        if keyword in self.free:
            return True
        known = self.fixed.get(keyword, _MISSING)
        if known is _MISSING and value is None:
            return _may_be_absent(keyword)
        if _is_number(value) and (bounds := self._same(keyword)) is not None:
            low, high = bounds
            return (low is None or value >= low) and (high is None or value <= high)
        return known == (list(value) if isinstance(value, tuple) else value)

    def _same(self, keyword: str) -> tuple[float | None, float | None] | None:
        """Returns the smallest and the largest value for which the program was found to be the same."""
        found = self.programs["call"].signature.get("same")
        return found.get(keyword) if isinstance(found, Mapping) else None

    def fits(self, texts: Mapping[str, Sequence[str]]) -> bool:
        """Returns True if the variant is for as many prompts."""
        prompts = texts.get("prompt")
        return prompts is None or not self.texts or len(prompts) == self.batch_size

    def text_refusal(self, texts: Mapping[str, Sequence[str]]) -> str:
        """Returns why the variant does not take these texts; empty if it takes them."""
        if reason := self._fixed_refusal(texts):
            return reason
        required = text_keywords([self.programs["call"]])
        texts = {keyword: each for keyword, each in texts.items() if keyword not in self.fixed}
        if "prompt" in required or any(keyword.startswith("prompt") for keyword in required):
            if "prompt" not in texts:
                return "prompt: give one, or a list of them"
        elif texts.keys() & {"prompt", "prompt_2", "prompt_3", "prompt_4"}:
            encoded = [keyword for keyword in self.tensors if "embeds" in keyword or "hidden_states" in keyword]
            what = f"takes {encoded[0]} in its place" if encoded else "takes none"
            return f"prompt: this variant {what}"
        given = [keyword for keyword, each in texts.items() if is_negative(keyword) and any(each)]
        if self.counts_tokens and given and not any(map(is_negative, self.texts)):
            return (
                f"{given[0]}: this bundle was compiled for negative prompts of no length. Add "
                '"negative_prompt_tokens" to the spec\'s inputs'
            )
        if "negative_prompt" in required and "negative_prompt" not in texts:
            return 'negative_prompt: this pipeline needs one. Give "" if there is nothing to keep out'
        missing = [keyword for keyword in required if "prompt" not in keyword and keyword not in texts]
        return f"{missing[0]}: this variant takes a text, and none is given" if missing else ""

    def _fixed_refusal(self, texts: Mapping[str, Sequence[str]]) -> str:
        """Returns why prompts that the variant fixes are not taken: they are others; empty if they are the same."""
        for keyword in texts.keys() & self.fixed.keys():
            known = as_texts(self.fixed[keyword])
            if set(texts[keyword]) != set(known):
                return f"{keyword}: this variant was compiled with {reprlib.repr(known[0])} and no other. Leave it out"
        return ""

    def tensor_refusal(self, given: Mapping[str, Any]) -> str:
        """Returns why the variant does not take these tensors, by keyword; empty if it takes them."""
        wanted = tensor_inputs(self.programs["call"].inputs)
        if missing := [keyword for keyword in wanted if keyword not in given]:
            types = ", ".join(str(item.type) for item in wanted[missing[0]])
            return f"{missing[0]}: this variant takes {types}, and none is given"
        strange = [keyword for keyword in given if keyword not in wanted and keyword != LATENTS]
        return f"{strange[0]}: this variant takes no such tensor" if strange else ""

    def image_refusal(self, given: Mapping[str, Sequence[Any]]) -> str:
        """Returns why the variant does not take these images, by keyword; empty if it takes them."""
        wanted = self.images
        for keyword in (*wanted, *given):
            count, found = wanted.get(keyword, 0), len(given.get(keyword, ()))
            if count != found:
                images = f"{count} image{'s' * (count != 1)}"
                return f"{keyword}: this variant takes {images}, and {found or 'none'} is given"
        sources = (item.source for item in self._inputs if item.source.get("kind") == "image")
        return next(filter(None, (refusal(source, given[source["keyword"]]) for source in sources)), "")


def as_texts(value: Any) -> list[str]:
    """Returns the texts of a prompt that a variant fixes, which the bundle has as one or as a list."""
    return [value] if isinstance(value, str) else [str(text) for text in value or [""]]


def _may_be_absent(keyword: str) -> bool:
    """Returns True for keywords that `fixed` never has: prompts, images and callbacks, where None means none."""
    return is_prompt(keyword) or keyword in IMAGES or "callback" in keyword


def checks_of(variants: Sequence[CompiledVariant], bundle: Any) -> str:
    """Returns what is said of the check of finished images; empty where the pipeline has none."""
    if any(FLAGS in _names(variant.programs["call"].signature.get("results")) for variant in variants):
        return "; a safety checker looks at the images"
    manifest = getattr(bundle, "manifest", None)
    omitted = manifest is not None and "safety_checker" in _names(manifest.source.get("omit"))
    return "; without its safety checker" if omitted else ""


def _names(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, list | tuple) else ()


def no_variant(
    class_name: str,
    variants: Sequence[CompiledVariant],
    batch: int | None,
    fixed: Mapping[str, Any],
    others: Collection[str],
    shown: Mapping[str, Any],
) -> str:
    """Returns what is said if no variant was compiled for these keywords: what differs, and what to write in the spec.

    Args:
        class_name: of the pipeline.
        variants: those that there are.
        batch: the number of prompts; None if there are none.
        fixed: the keywords of the call that a variant fixes.
        others: keywords that the call takes besides.
        shown: `fixed` as an error shows it, without the numbers of tensors.
    """
    known = {name for variant in variants for name in variant.fixed} | variants[0].free
    unknown = [name for name in fixed if name not in known and not (fixed[name] is None and _may_be_absent(name))]
    if unknown:
        taken = known | set(others)
        for variant in variants:
            taken |= {*variant.texts, *variant.images, *variant.tensors}
        meant = suggest(unknown[0], taken)
        return f"{unknown[0]}: {class_name} was not compiled with this keyword. " + (
            meant or f"It takes {', '.join(sorted(taken))}"
        )
    nearest = min(variants, key=lambda variant: len(_differing(variant, batch, fixed)))
    differing = _differing(nearest, batch, fixed)
    asked = _words({name: shown.get(name, value) for name, value in differing.items()})
    if any(not _differing(variant, variant.batch_size, differing) for variant in variants):
        asked += f" with {_words({k: v for k, v in shown.items() if k not in differing})}"
    return (
        f"no variant was compiled for {asked}. The bundle has {_rows(variants, differing)}\n"
        f"To call it so, add to the spec a variant with {_to_write(differing, shown)}"
    )


def _differing(variant: CompiledVariant, batch: int | None, fixed: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what is asked for and the variant does not have."""
    found: dict[str, Any] = {} if batch in (None, variant.batch_size) else {_BATCH: batch}
    return found | {name: value for name, value in fixed.items() if not variant.agrees(name, value)}


def _rows(variants: Sequence[CompiledVariant], differing: Mapping[str, Any]) -> str:
    """Lists the variants, one a line; of many, what they differ in."""
    if len(variants) > _FEW:
        return f"{len(variants)} variants, with {_span(variants)}."
    rows = []
    for variant in variants:
        shown = {k: variant.fixed.get(k) for k in sorted(_SHOWN | (differing.keys() - {_BATCH}))}
        named = {k: v for k, v in shown.items() if v is not None or k in differing}
        rows.append(f"  {variant.name}: batch of prompts {variant.batch_size}, " + _words(named))
    return "\n" + "\n".join(rows)


def _to_write(differing: Mapping[str, Any], shown: Mapping[str, Any]) -> str:
    """Returns the part of a spec's `inputs` that a variant for the call has."""
    inputs: dict[str, Any] = {}
    call: dict[str, Any] = {}
    for name, value in differing.items():
        own = "batch_size" if name == _BATCH else name
        (inputs if own in _OF_INPUTS else call)[own] = value
    written = inputs | ({"call": call} if call else {})
    try:
        text = json.dumps(written)
    except (TypeError, ValueError):
        text = ""
    hidden = any(shown.get(name, value) is not value for name, value in differing.items())
    if hidden or not text or len(text) > _LONG:
        return f"{', '.join(differing)} in `inputs`" + (" (`call`)" if call else "")
    return f'"inputs": {{…, {text[1:-1]}}}'


def _span(variants: Sequence[CompiledVariant]) -> str:
    """Returns what many variants differ in."""
    parts = []
    for name in sorted(_SHOWN):
        values: list[Any] = sorted({v.fixed[name] for v in variants if v.fixed.get(name) is not None})
        if len(values) > 1:
            parts.append(f"{name} of {', '.join(map(str, values))}")
    return "; ".join(parts)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _words(values: Mapping[str, Any]) -> str:
    shown = {name: reprlib.repr(value) for name, value in values.items()}
    return ", ".join(f"{name}={value}" if " " not in name else f"{name} {value}" for name, value in shown.items())
