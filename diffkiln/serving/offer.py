"""What a bundle offers to clients, read from its programs alone, and how a request chooses among its variants."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from diffkiln.bundle import Verified, open_bundle
from diffkiln.errors import Incompatible, ManifestInvalid
from diffkiln.guards.limits import active
from diffkiln.program import STEP, program_from_json, why_unseen
from diffkiln.program.calls import Given
from diffkiln.program.images import IMAGES
from diffkiln.runtime.given import is_prompt
from diffkiln.runtime.graphs import WHOLE
from diffkiln.runtime.opening import read_json
from diffkiln.runtime.processes import mesh_of
from diffkiln.runtime.variants import CompiledVariant, as_texts
from diffkiln.serving.refusals import Refusal

_PROMPTS = ("prompt", "negative_prompt")


@dataclass(frozen=True)
class Choice:
    """The variants that requests of one kind are run with: a variant of each batch.

    Attributes:
        keywords: The fixed keywords of the variants, and those that the request gives.
        batches: Prompts in a call, ascending.
        images: Images that each prompt gives.
        steps: Denoising steps.
        unseen: Why no step before the last can be shown; empty where it can.
        frames: Pictures of a video; 0 where images are made.
    """

    keywords: Mapping[str, Any]
    batches: tuple[int, ...]
    images: int
    steps: int
    unseen: str = ""
    frames: int = 0

    def fits(self, rows: int) -> int:
        """Returns the batch for so many rows: the largest that they fill, or the smallest."""
        return max((batch for batch in self.batches if batch <= rows), default=self.batches[0])


@dataclass(frozen=True)
class Offer:
    """The requests that clients may make of one bundle.

    Attributes:
        name: What requests call it, in `model`.
        bundle_id: Of the bundle.
        variants: What it was compiled for.
        one_launch: Whether all steps are one CUDA graph.
        processes: That run each call together.
    """

    name: str
    bundle_id: str
    class_name: str
    variants: tuple[CompiledVariant, ...]
    one_launch: bool = False
    processes: int = 1
    _known: dict[str, Choice] = field(default_factory=dict, compare=False, repr=False)

    @cached_property
    def sizes(self) -> tuple[str, ...]:
        """Returns the sizes as OpenAI writes them, width first: "1024x768"."""
        found = [size for variant in self.variants if (size := size_of(variant.fixed))]
        return tuple(dict.fromkeys(found))

    @cached_property
    def steps(self) -> tuple[int, ...]:
        """Returns the numbers of steps that the variants were compiled for."""
        found = [variant.fixed.get("num_inference_steps") for variant in self.variants]
        return tuple(sorted({steps for steps in found if isinstance(steps, int)}))

    @cached_property
    def takes(self) -> Mapping[str, int]:
        """Returns the keywords that take images, and how many each, of the first variant of the smallest batch."""
        return min(self.variants, key=lambda variant: variant.batch_size).images

    @cached_property
    def videos(self) -> bool:
        """Returns True if the bundle makes videos."""
        return self.variants[0].programs["call"].signature.get("result") == "frames"

    @cached_property
    def negative(self) -> bool:
        """Returns True if a negative prompt means something to the bundle."""
        return any(_takes_negative(variant) for variant in self.variants)

    @cached_property
    def scales(self) -> bool:
        """Returns True if a request may choose the guidance scale."""
        return any("guidance_scale" in variant.free for variant in self.variants)

    @cached_property
    def scale_above(self) -> float | None:
        """Returns the guidance scale that a request must be above, in every variant; None if one takes any."""
        found = [_scale_above(variant) for variant in self.variants]
        known = [above for above in found if above is not None]
        return min(known) if known and len(known) == len(found) else None

    @cached_property
    def shows(self) -> bool:
        """Returns True if a step before the last can be shown, in any variant."""
        return not all(self._unseen(variant) for variant in self.variants)

    def choose(self, asked: Mapping[str, Any], negative: bool) -> Choice:
        """Returns what a request is run with.

        Args:
            asked: Keywords of the call, other than prompts and images.
            negative: Whether a negative prompt comes with it.

        Raises:
            Refusal: no variant was compiled for them.
        """
        key = json.dumps([sorted(asked.items()), negative])
        if key not in self._known:
            if len(self._known) > 10_000:  # guidance scales are any number
                self._known.clear()
            self._known[key] = self._choose(asked, negative)
        return self._known[key]

    def _choose(self, asked: Mapping[str, Any], negative: bool) -> Choice:
        fitting = [variant for variant in self.variants if all(variant.agrees(k, v) for k, v in asked.items())]
        if negative:
            fitting = [variant for variant in fitting if _takes_negative(variant)]
        if not fitting:
            words = ", ".join(f"{name} {value}" for name, value in asked.items())
            reason = f"no variant of {self.name} was compiled for {words or 'a negative prompt'}"
            raise Refusal(400, f"{reason}. {self.advice}", next(iter(asked), "negative_prompt"))
        first = min((v for v in fitting if v.fixed == fitting[0].fixed), key=lambda variant: variant.batch_size)
        alike = [variant for variant in fitting if _alike(variant, first)]
        fixed = {k: v for k, v in first.fixed.items() if v is not None and k not in IMAGES and not _is_prompt(k)}
        steps = sum(op.name == STEP for op in first.programs["call"].ops)
        batches = tuple(sorted({variant.batch_size for variant in alike}))
        images = int(first.fixed.get("num_images_per_prompt") or 1)
        frames = _frames(first) if self.videos else 0
        return Choice({**fixed, **asked}, batches, images, steps, self._unseen(first), frames)

    def _unseen(self, variant: CompiledVariant) -> str:
        if self.processes > 1:
            return "several processes run it together"
        return "all steps are one CUDA graph" if self.one_launch else why_unseen(variant.programs["call"])

    @property
    def advice(self) -> str:
        """Returns what there is, in a sentence."""
        parts = [f"size {', '.join(self.sizes)}"] if self.sizes else []
        if self.steps:
            parts.append(f"num_inference_steps {', '.join(map(str, self.steps))}")
        return f"There is {'; '.join(parts)}" if parts else "Leave it out"


def read_offer(path: str | os.PathLike[str], name: str) -> Offer:
    """Returns what the bundle at `path` offers. No weights are read, and nothing is loaded.

    Raises:
        IntegrityError: the bundle is not whole.
        Incompatible: it runs as diffusers only.
    """
    with open_bundle(path, ignore_signature=True) as bundle, bundle.verify(roles={"program"}) as verified:
        manifest = verified.manifest
        if manifest.runtime.get("only_diffusers"):
            raise Incompatible(f"{name}: this bundle runs only as diffusers, which serving does not. Compile another")
        active().check("variants", len(manifest.pipeline.variants), "the manifest")
        variants = [
            CompiledVariant(row.name, row.fixed, {key: _program(verified, at, key) for key, at in row.programs.items()})
            for row in manifest.pipeline.variants
        ]
        if not variants or any("call" not in variant.programs for variant in variants):
            raise ManifestInvalid(f"{name}: the bundle has no program of a call, so it cannot be served")
        one_launch = manifest.runtime.get("cuda_graphs") == WHOLE
        mesh = mesh_of(manifest)
        count = 1 if mesh is None else mesh.size
        return Offer(name, bundle.id, manifest.pipeline.class_name, tuple(variants), one_launch, count)


def size_of(fixed: Mapping[str, Any]) -> str:
    """Returns the size of a variant as OpenAI writes it; empty where it has none."""
    width, height = fixed.get("width"), fixed.get("height")
    return f"{width}x{height}" if width and height else ""


def _program(verified: Verified, path: str, name: str) -> Any:
    try:
        return program_from_json(read_json(verified, path)["programs"][name])
    except (KeyError, TypeError):
        raise ManifestInvalid(f"{path!r} holds no program {name!r}, which a variant names") from None


def _scale_above(variant: CompiledVariant) -> float | None:
    sources = (item.source for item in variant.programs["call"].inputs)
    found = (source.get("above") for source in sources if source.get("keyword") == "guidance_scale")
    return next(found, None)


def _frames(variant: CompiledVariant) -> int:
    program = variant.programs["call"]
    return program.types[program.outputs[0].name].shape[1]  # videos, frames, channels, height, width


def _takes_negative(variant: CompiledVariant) -> bool:
    rows = [row for text in variant.programs["call"].texts for row in text["rows"]]
    named = any(str(row.get("keyword", "")).startswith("negative") for row in rows)
    return named or Given(negative=True).name in variant.programs


def _alike(variant: CompiledVariant, first: CompiledVariant) -> bool:
    """Returns True if a call of this variant gives what calls of the first, which has a smaller batch, would give."""
    if _fixed(variant) != _fixed(first) or _takes_negative(variant) != _takes_negative(first):
        return False
    if variant.batch_size == first.batch_size:
        return True
    # One image a prompt is the only division of images among prompts that is certain.
    counts: Sequence[int] = [*first.images.values(), first.batch_size]
    return set(counts) <= {1} and set(variant.images.values()) <= {variant.batch_size}


def _fixed(variant: CompiledVariant) -> dict[str, Any]:
    """Returns what a variant fixes, with the texts of its prompts once: a larger batch has them as often as it is
    large."""
    return {name: set(as_texts(value)) if is_prompt(name) else value for name, value in variant.fixed.items()}


def _is_prompt(keyword: str) -> bool:
    return keyword.startswith(_PROMPTS) and not keyword.endswith(("embeds", "mask"))
