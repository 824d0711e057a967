"""The pipeline that a bundle gives: called as the original one is, running on torch alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from diffkiln.errors import CallError
from diffkiln.program import Program
from diffkiln.runtime.executor import Executor
from diffkiln.runtime.images import convert
from diffkiln.runtime.noise import Generators
from diffkiln.runtime.text import TextEnd

PROMPT, NEGATIVE = "prompt", "negative_prompt"
_NEVER_FIXED = {"generator", "latents", "output_type", "return_dict", "callback_on_step_end"}
_STEP_INPUTS = "callback_on_step_end_tensor_inputs"


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
    """

    def __init__(
        self, class_name: str, variants: Sequence[CompiledVariant], executor: Executor, text: TextEnd, bundle: Any
    ) -> None:
        self.class_name, self.variants, self.executor = class_name, tuple(variants), executor
        self.bundle = bundle
        self._text = text

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
                when the bundle was compiled must have the value of a variant.

        Raises:
            CallError: an unknown keyword, a value that no variant has, or a wrong number of prompts.
        """
        prompts, fixed = self._split(prompt, keywords)
        self._check_step_inputs(fixed)
        variant, program = self._choose(prompts, fixed, latents is not None)
        inputs = list(self._inputs(variant, program, prompts, fixed, latents))
        step_end = self._step_end(callback_on_step_end)
        result = self.executor(program, inputs, generator, step_end)[0]
        name = str(program.signature.get("result", "images"))
        images = self.executor.last_latents if output_type == "latent" else convert(result, output_type)
        return Output({name: images}) if return_dict else (images,)

    def close(self) -> None:
        """Let go of weights, threads, descriptors and temporary files."""
        self.executor.store.close()
        self.bundle.close()

    def __enter__(self) -> CompiledPipeline:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- choosing --

    def _split(self, prompt: Any, keywords: Mapping[str, Any]) -> tuple[dict[str, list[str]], dict[str, Any]]:
        """Prompts by keyword, and the rest."""
        given = {PROMPT: prompt} | dict(keywords)
        prompts: dict[str, list[str]] = {}
        rest: dict[str, Any] = {}
        for name, value in given.items():
            if name.startswith((PROMPT, NEGATIVE)) and not name.endswith(("embeds", "mask")):
                if value is not None:
                    prompts[name] = _texts(name, value)
            else:
                rest[name] = value
        if PROMPT not in prompts:
            raise CallError("prompt: give one, or a list of them")
        return prompts, rest

    def _choose(
        self, prompts: Mapping[str, list[str]], fixed: Mapping[str, Any], latents: bool
    ) -> tuple[CompiledVariant, Program]:
        batch = len(prompts[PROMPT])
        for variant in self.variants:
            if variant.batch_size == batch and all(self._agrees(variant, k, v) for k, v in fixed.items()):
                return variant, self._program(variant, prompts, latents)
        raise CallError(self._no_variant(batch, fixed))

    def _agrees(self, variant: CompiledVariant, keyword: str, value: Any) -> bool:
        if keyword == _STEP_INPUTS or keyword in _scalars(variant.programs["call"]):
            return True
        known = variant.fixed.get(keyword, _MISSING)
        if known is _MISSING and value is None:
            return True
        return known == (list(value) if isinstance(value, tuple) else value)

    def _no_variant(self, batch: int, fixed: Mapping[str, Any]) -> str:
        known = {name for variant in self.variants for name in variant.fixed} | _scalars(
            self.variants[0].programs["call"]
        )
        unknown = [name for name in fixed if name not in known and fixed[name] is not None]
        if unknown:
            taken = ", ".join(sorted(known))
            return f"{unknown[0]}: {self.class_name} was not compiled with this keyword. It takes {taken}"
        asked = {"batch of prompts": batch, **fixed}
        if len(self.variants) > _FEW:
            many = f"{len(self.variants)} variants, with {self._span()}"
            return f"no variant was compiled for {_words(asked)}. The bundle has {many}"
        differing = {name for name in fixed if any(v.fixed.get(name, _MISSING) != fixed[name] for v in self.variants)}
        rows = []
        for variant in self.variants:
            shown = {k: variant.fixed[k] for k in sorted(_SHOWN | differing) if variant.fixed.get(k) is not None}
            rows.append(f"  {variant.name}: batch of prompts {variant.batch_size}, " + _words(shown))
        return f"no variant was compiled for {_words(asked)}. The bundle has\n" + "\n".join(rows)

    def _span(self) -> str:
        """What many variants differ in."""
        parts = []
        for name in sorted(_SHOWN):
            values: list[Any] = sorted({v.fixed[name] for v in self.variants if v.fixed.get(name) is not None})
            if len(values) > 1:
                parts.append(f"{name} of {', '.join(map(str, values))}")
        return "; ".join(parts)

    def _program(self, variant: CompiledVariant, prompts: Mapping[str, list[str]], latents: bool) -> Program:
        name = "call"
        if any(keyword.startswith(NEGATIVE) for keyword in prompts) and "call+negative" in variant.programs:
            name += "+negative"
        if latents:
            name += "+latents"
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
            else:
                value = latents
            if isinstance(value, torch.Tensor) and tuple(value.shape) != item.type.shape:
                raise CallError(f"{item.name[1:]}: shape {tuple(value.shape)}, this variant takes {item.type.shape}")
            yield value.to(getattr(torch, item.type.dtype)) if isinstance(value, torch.Tensor) else value

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
        raise CallError(f"{keyword}: {value!r} is neither a string nor a list of strings")
    return list(texts)


_MISSING = object()
#: So many variants are listed one by one in an error.
_FEW = 8
_SHOWN = {"height", "width", "num_frames", "num_inference_steps", "num_images_per_prompt"}


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


def _scalars(program: Program) -> set[str]:
    return {item.source["keyword"] for item in program.inputs if item.source.get("kind") == "scalar"}


def _scalar(source: Mapping[str, Any], given: Mapping[str, Any]) -> float:
    value = given.get(source["keyword"])
    value = float(source["default"] if value is None else value)
    if "above" in source and value <= source["above"]:
        raise CallError(
            f"{source['keyword']}: {value} turns guidance off, which is another program. Compile a variant with it"
        )
    return value


def _words(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" if " " not in name else f"{name} {value}" for name, value in values.items())
