"""The variants of a bundle: which of them a call asks for, and what is said where none fits."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diffkiln.program import Input, Program
from diffkiln.program.images import image_keywords
from diffkiln.runtime.image_end import refusal

_MISSING = object()
#: So many variants are listed one by one in an error.
_FEW = 8
_SHOWN = {"height", "width", "num_frames", "num_inference_steps", "num_images_per_prompt"}


@dataclass(frozen=True)
class CompiledVariant:
    """One choice of the fixed keywords: its programs by the optional keywords that a caller gives with it."""

    name: str
    fixed: Mapping[str, Any]
    programs: Mapping[str, Program]

    @property
    def batch_size(self) -> int:
        rows = [row["index"] + 1 for text in self.programs["call"].texts for row in text["rows"] if "index" in row]
        return max(rows, default=1)

    @property
    def free(self) -> set[str]:
        """Keywords of which any value will do."""
        inputs = self.programs["call"].inputs
        return {item.source["keyword"] for item in inputs if item.source.get("kind") == "scalar"}

    @property
    def images(self) -> dict[str, int]:
        """Keywords that take images, and how many each."""
        return image_keywords(self._inputs)

    @property
    def _inputs(self) -> list[Input]:
        """Those of all its programs: which of them runs is known later than what it is given."""
        return [item for program in self.programs.values() for item in program.inputs]

    def agrees(self, keyword: str, value: Any) -> bool:
        """Whether the variant can be called with this value."""
        if keyword in self.free:
            return True
        known = self.fixed.get(keyword, _MISSING)
        if known is _MISSING and value is None:
            return True
        return known == (list(value) if isinstance(value, tuple) else value)

    def image_refusal(self, given: Mapping[str, Sequence[Any]]) -> str:
        """Why these images, by keyword, are not those that the variant takes; empty where they are."""
        wanted = self.images
        for keyword in (*wanted, *given):
            count, found = wanted.get(keyword, 0), len(given.get(keyword, ()))
            if count != found:
                images = f"{count} image{'s' * (count != 1)}"
                return f"{keyword}: this variant takes {images}, and {found or 'none'} is given"
        sources = (item.source for item in self._inputs if item.source.get("kind") == "image")
        return next(filter(None, (refusal(source, given[source["keyword"]]) for source in sources)), "")


def no_variant(class_name: str, variants: Sequence[CompiledVariant], batch: int, fixed: Mapping[str, Any]) -> str:
    """What is said where no variant was compiled for these keywords: the nearest that there is."""
    known = {name for variant in variants for name in variant.fixed} | variants[0].free
    unknown = [name for name in fixed if name not in known and fixed[name] is not None]
    if unknown:
        taken = ", ".join(sorted(known))
        return f"{unknown[0]}: {class_name} was not compiled with this keyword. It takes {taken}"
    asked = {"batch of prompts": batch, **fixed}
    if len(variants) > _FEW:
        many = f"{len(variants)} variants, with {_span(variants)}"
        return f"no variant was compiled for {_words(asked)}. The bundle has {many}"
    differing = {name for name in fixed if any(v.fixed.get(name, _MISSING) != fixed[name] for v in variants)}
    rows = []
    for variant in variants:
        shown = {k: variant.fixed[k] for k in sorted(_SHOWN | differing) if variant.fixed.get(k) is not None}
        rows.append(f"  {variant.name}: batch of prompts {variant.batch_size}, " + _words(shown))
    return f"no variant was compiled for {_words(asked)}. The bundle has\n" + "\n".join(rows)


def _span(variants: Sequence[CompiledVariant]) -> str:
    """What many variants differ in."""
    parts = []
    for name in sorted(_SHOWN):
        values: list[Any] = sorted({v.fixed[name] for v in variants if v.fixed.get(name) is not None})
        if len(values) > 1:
            parts.append(f"{name} of {', '.join(map(str, values))}")
    return "; ".join(parts)


def _words(values: Mapping[str, Any]) -> str:
    shown = {name: reprlib.repr(value) for name, value in values.items()}
    return ", ".join(f"{name}={value}" if " " not in name else f"{name} {value}" for name, value in shown.items())
