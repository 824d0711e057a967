"""The pipeline that a bundle gives: called as the original one is, running on torch alone."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from diffkiln.errors import CallError
from diffkiln.guards.gate import gated
from diffkiln.guards.limits import active, applied
from diffkiln.interpreter.aten import dtype_of
from diffkiln.program import Program
from diffkiln.program.calls import Given
from diffkiln.runtime.executor import Executor
from diffkiln.runtime.image_end import image_list, pixels
from diffkiln.runtime.images import check_output_type, convert
from diffkiln.runtime.noise import Generators
from diffkiln.runtime.text import TextEnd
from diffkiln.runtime.variants import CompiledVariant, no_variant

PROMPT, NEGATIVE = "prompt", "negative_prompt"
_SURROGATE = re.compile("[\ud800-\udfff]")
_STEP_INPUTS = "callback_on_step_end_tensor_inputs"
#: So many variants stand in `repr`.
_NAMED = 4


class Output(dict[str, Any]):
    """What a call gives: `.images` or `.frames`, as diffusers names it."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class CompiledPipeline:
    """A bundle, ready to run.

    Attributes:
        variants: what it was compiled for.
        executor: runs its programs; `executor.store` counts the weights in memory.
        limits: what a call may take: those that `load` was given.
    """

    def __init__(
        self, class_name: str, variants: Sequence[CompiledVariant], executor: Executor, text: TextEnd, bundle: Any
    ) -> None:
        self.class_name, self.variants, self.executor = class_name, tuple(variants), executor
        self.bundle = bundle
        self.limits = active()
        self._text = text

    @gated("callback_on_step_end")
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        generator: Generators = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, float, dict[str, torch.Tensor]], Mapping[str, Any] | None]
        | None = None,
        **keywords: Any,
    ) -> Any:
        """Make images or videos.

        Args:
            prompt: one, or a list as long as the variant's batch.
            generator: one, or one for each image; the same generator gives the same noise as in diffusers.
            latents: your own noise, in the form that the original pipeline takes.
            output_type: "pil", "np", "pt" or "latent".
            return_dict: False gives a tuple.
            callback_on_step_end: called as `(pipeline, step, timestep, {"latents": …})` after each step; latents that
                it returns in a dict take the place of the step's.
            **keywords: negative_prompt, prompt_2, guidance_scale, height, … as in the original call. One that was fixed
                when the bundle was compiled must have the value of a variant. Images (image, mask_image, …) are
                `PIL.Image.Image`s, arrays [height, width, channels] or tensors [channels, height, width] of numbers
                from 0 to 1, or lists of them.

        Raises:
            CallError: an unknown keyword, a value that no variant has, a wrong number of prompts or images, or an
                unknown output type.
        """
        with applied(self.limits):
            return self._called(prompt, generator, latents, output_type, return_dict, callback_on_step_end, keywords)

    def _called(
        self,
        prompt: str | Sequence[str] | None,
        generator: Generators,
        latents: torch.Tensor | None,
        output_type: str,
        return_dict: bool,
        callback_on_step_end: Callable[..., Any] | None,
        keywords: Mapping[str, Any],
    ) -> Any:
        check_output_type(output_type)
        prompts, images, fixed = self._split(prompt, keywords)
        self._check_step_inputs(fixed)
        variant, program = self._choose(prompts, images, fixed, latents is not None)
        inputs = list(self._inputs(variant, program, prompts, images, fixed, latents))
        step_end = self._step_end(callback_on_step_end)
        result = self.executor(program, inputs, generator, step_end, latents=output_type == "latent")[0]
        name = str(program.signature.get("result", "images"))
        made = result if output_type == "latent" else convert(result, output_type)
        return Output({name: made}) if return_dict else (made,)

    def __repr__(self) -> str:
        """Returns the class, the device and the variants, the first few by name."""
        names = [variant.name for variant in self.variants]
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        return f"<{self.class_name}, compiled, on {self.executor.device}: {', '.join(names[:_NAMED])}{more}>"

    def close(self) -> None:
        """Let go of weights, graphs, threads, descriptors and temporary files."""
        if self.executor.graphs is not None:
            self.executor.graphs.close()
        self.executor.store.close()
        self.bundle.close()

    def __enter__(self) -> CompiledPipeline:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- choosing --

    def _split(
        self, prompt: Any, keywords: Mapping[str, Any]
    ) -> tuple[dict[str, list[str]], dict[str, list[Any]], dict[str, Any]]:
        """Prompts by keyword, images by keyword, and the rest."""
        given = {PROMPT: prompt} | dict(keywords)
        taken = {keyword for variant in self.variants for keyword in variant.images}
        prompts: dict[str, list[str]] = {}
        images: dict[str, list[Any]] = {}
        rest: dict[str, Any] = {}
        for name, value in given.items():
            if name.startswith((PROMPT, NEGATIVE)) and not name.endswith(("embeds", "mask")):
                if value is not None:
                    prompts[name] = _texts(name, value)
            elif name in taken:
                if value is not None:
                    images[name] = image_list(name, value)
            else:  # arrays compare by element, and are no word of an error
                rest[name] = value.tolist() if isinstance(value, np.ndarray | torch.Tensor) else value
        if PROMPT not in prompts:
            raise CallError("prompt: give one, or a list of them")
        return prompts, images, rest

    def _choose(
        self,
        prompts: Mapping[str, list[str]],
        images: Mapping[str, Sequence[Any]],
        fixed: Mapping[str, Any],
        latents: bool,
    ) -> tuple[CompiledVariant, Program]:
        batch, refused = len(prompts[PROMPT]), ""
        others = {keyword: value for keyword, value in fixed.items() if keyword != _STEP_INPUTS}
        for variant in self.variants:
            if variant.batch_size == batch and all(variant.agrees(k, v) for k, v in others.items()):
                reason = variant.image_refusal(images)
                if not reason:
                    return variant, self._program(variant, prompts, latents)
                refused = refused or reason
        raise CallError(refused or no_variant(self.class_name, self.variants, batch, others))

    def _program(self, variant: CompiledVariant, prompts: Mapping[str, list[str]], latents: bool) -> Program:
        negative = any(keyword.startswith(NEGATIVE) for keyword in prompts)
        name = Given(negative and Given(negative=True).name in variant.programs, latents).name
        if name not in variant.programs:
            raise CallError(
                f"latents: this bundle was not compiled to take them (it has {', '.join(variant.programs)})"
            )
        return variant.programs[name]

    # -- inputs --

    def _inputs(
        self,
        variant: CompiledVariant,
        program: Program,
        prompts: Mapping[str, list[str]],
        images: Mapping[str, Sequence[Any]],
        fixed: Mapping[str, Any],
        latents: torch.Tensor | None,
    ) -> Iterator[Any]:
        complete = with_defaults(program, prompts, variant.batch_size)
        tokens = [self._text.encode(text, complete) for text in program.texts]
        for item in program.inputs:
            source = item.source
            if source["kind"] == "tokens":
                value: Any = tokens[source["text"]][source["key"]]
            elif source["kind"] == "scalar":
                value = _scalar(item.source, fixed)
            elif source["kind"] == "image":
                value = pixels(source, item.type.shape, images[source["keyword"]])
            else:
                value = latents
            if isinstance(value, torch.Tensor) and tuple(value.shape) != item.type.shape:
                raise CallError(f"{item.argument}: shape {tuple(value.shape)}, this variant takes {item.type.shape}")
            yield value.to(dtype_of(item.type.dtype)) if isinstance(value, torch.Tensor) else value

    def _check_step_inputs(self, fixed: Mapping[str, Any]) -> None:
        if fixed.get(_STEP_INPUTS) not in (None, ["latents"], ("latents",)):
            raise CallError(f"{_STEP_INPUTS}: a compiled call shows the step's latents only")

    def _step_end(self, callback: Any) -> Any:
        if callback is None:
            return None

        def end(step: int, timestep: float, latents: torch.Tensor) -> torch.Tensor:
            changed = callback(self, step, timestep, {"latents": latents}) or {}
            return changed.get("latents", latents)

        return end


def _texts(keyword: str, value: Any) -> list[str]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) for text in texts):
        raise CallError(f"{keyword}: {reprlib.repr(value)} is neither a string nor a list of strings")
    for text in texts:
        if not text.isascii() and _SURROGATE.search(text):
            raise CallError(f"{keyword}: {text[:40]!r} holds half of a character (a surrogate). Decode it as UTF-8")
    return list(texts)


def with_defaults(program: Program, prompts: Mapping[str, list[str]], batch: int) -> dict[str, list[str]]:
    """The prompts with those left out filled in as diffusers does: prompt_2 is prompt, no negative prompt is empty."""
    complete = dict(prompts)
    wanted = {row["keyword"] for text in program.texts for row in text["rows"] if "keyword" in row}
    for keyword in sorted(wanted - complete.keys()):
        base = NEGATIVE if keyword.startswith(NEGATIVE) else PROMPT
        complete[keyword] = complete.get(base, [""] * batch)
    for keyword, texts in complete.items():
        if len(texts) == 1 and batch > 1 and keyword != PROMPT:
            complete[keyword] = texts * batch
        elif len(texts) != batch:
            raise CallError(f"{keyword}: {len(texts)} prompts, this variant takes {batch}")
    return complete


def _scalar(source: Mapping[str, Any], given: Mapping[str, Any]) -> float:
    value = given.get(source["keyword"])
    try:
        value = float(source["default"] if value is None else value)
    except (TypeError, ValueError):
        raise CallError(f"{source['keyword']}: {reprlib.repr(value)} is no number") from None
    if "above" in source and value <= source["above"]:
        raise CallError(
            f"{source['keyword']}: {value} turns guidance off, which is another program. Compile a variant with it"
        )
    return value
