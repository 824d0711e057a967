"""The pipeline that a bundle gives: called as the original one is, running on torch alone."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from diffkiln.errors import CallError
from diffkiln.guards.gate import gated
from diffkiln.guards.limits import active, applied
from diffkiln.interpreter.aten import dtype_of
from diffkiln.program import Program
from diffkiln.program.calls import Given
from diffkiln.runtime.adapters.api import Adaptable
from diffkiln.runtime.adapters.scales import AnyScale
from diffkiln.runtime.adapters.shelf import Mixes, Shelf
from diffkiln.runtime.attributes import Interrupt, check_device, refused
from diffkiln.runtime.executor import Executor
from diffkiln.runtime.given import LATENTS, described, is_negative, tensor_inputs, tensor_list, untaken
from diffkiln.runtime.image_end import image_list, pixels
from diffkiln.runtime.images import OWN, check_output_type
from diffkiln.runtime.noise import Generators, check_generators
from diffkiln.runtime.results import form_of, output_of
from diffkiln.runtime.text import Miscount, TextEnd, counts_refusal
from diffkiln.runtime.turns import PATIENCE
from diffkiln.runtime.variants import CompiledVariant, checks_of, no_variant

PROMPT, NEGATIVE = "prompt", "negative_prompt"
_SURROGATE = re.compile("[\ud800-\udfff]")
_STEP_INPUTS = "callback_on_step_end_tensor_inputs"
#: Keywords that belong to the caller, whatever was compiled.
_CALLERS = (
    PROMPT,
    NEGATIVE,
    "generator", "latents", "output_type", "return_dict", "callback_on_step_end", "adapters", "timeout", "allow_nan",
)  # fmt: skip
#: So many variants stand in `repr`.
_NAMED = 4
_OWN = frozenset({"class_name", "variants", "executor", "bundle", "limits", "_text", "_shelf"})


@dataclass(frozen=True)
class _Call:
    """The arguments of a caller: texts, images and tensors by keyword, and the keywords that a variant fixes."""

    texts: dict[str, list[str]] = field(default_factory=dict)
    images: dict[str, list[Any]] = field(default_factory=dict)
    tensors: dict[str, Any] = field(default_factory=dict)
    fixed: dict[str, Any] = field(default_factory=dict)


class CompiledPipeline(Adaptable):
    """A bundle, ready to run.

    Attributes:
        variants: the choices of fixed keywords that the bundle was compiled for.
        executor: runs its programs; `executor.store` counts the weights in memory.
        limits: the limits of a call, as given to `load`.
    """

    def __init__(
        self, class_name: str, variants: Sequence[CompiledVariant], executor: Executor, text: TextEnd, bundle: Any
    ) -> None:
        self.class_name, self.variants, self.executor = class_name, tuple(variants), executor
        self.bundle = bundle
        self.limits = active()
        self._text = text
        self._shelf = Shelf(bundle, executor, self.variants)

    def __setattr__(self, name: str, value: Any) -> None:
        """Sets what this class has. What only the original has would be ignored, so it is refused."""
        if name not in _OWN and not hasattr(type(self), name):
            raise refused(name, "set")
        try:
            super().__setattr__(name, value)
        except AttributeError:
            raise refused(name, "set") from None

    def __getattr__(self, name: str) -> Any:
        raise refused(name, "found")

    def __reduce__(self) -> Any:
        raise CallError(
            "a loaded pipeline cannot be copied or sent to another process. Send the bundle's path: load it"
        )

    @gated("callback_on_step_end")
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        generator: Generators = None,
        latents: torch.Tensor | None = None,
        output_type: str = OWN,
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, float, dict[str, torch.Tensor]], Mapping[str, Any] | None]
        | None = None,
        adapters: Mapping[str, AnyScale] | Sequence[Mapping[str, AnyScale]] | None = None,
        timeout: float | None = PATIENCE,
        allow_nan: bool = False,
        **keywords: Any,
    ) -> Any:
        """Makes images, videos or sound.

        A pipeline makes one call at a time. Calls of other threads wait for their turn, in the order they came.

        Args:
            prompt: a prompt, or a list as long as the variant's batch; none if the pipeline takes none.
            generator: a generator, or one for each image. The same generator gives the same noise as in diffusers.
            latents: your own noise, in the form that the original pipeline takes.
            output_type: "pil", "np", "pt" or "latent"; by default "pil" for pictures, and the original's own for the
                rest.
            return_dict: False returns a tuple.
            callback_on_step_end: called as `(pipeline, step, timestep, {"latents": …})` after each step. If it returns
                latents in a dict, these replace the step's latents.
            adapters: loaded adapters with their scales, for this call alone; by default those of `set_adapters`. A
                bundle with slots also takes a list, with those of each prompt.
            timeout: seconds to wait for calls of other threads; None waits for ever.
            allow_nan: returns the result even if numbers overflowed, as diffusers does: mostly black pictures.
            **keywords: negative_prompt, prompt_2, guidance_scale, height, … as in the original call. A keyword that was
                fixed at compile time must have the value of a variant. Images (image, mask_image, …) are
                `PIL.Image.Image`s, arrays [height, width, channels] or tensors [channels, height, width] of numbers
                from 0 to 1, or lists of them. Tensors that the spec declares (prompt_embeds, …) are tensors or arrays
                of that shape.

        Raises:
            CallError: an unknown keyword, a value that no variant has, a wrong number of prompts or images, a tensor of
                another shape, or an unknown output type; a call from a callback of this pipeline's own call; or the
                pipeline is closed.
            Busy: calls of other threads took longer than `timeout`.
            NotFinite: the result is not finite; names the component that gave such numbers first.
        """
        given = {PROMPT: prompt, LATENTS: latents} | keywords
        mixes = None if adapters is None else self._shelf.checked(adapters)
        with applied(self.limits):
            step_end = callback_on_step_end
            return self._called(given, generator, output_type, return_dict, step_end, timeout, allow_nan, mixes)

    def _called(
        self,
        given: Mapping[str, Any],
        generator: Generators,
        output_type: str,
        return_dict: bool,
        callback_on_step_end: Callable[..., Any] | None,
        timeout: float | None,
        allow_nan: bool,
        mixes: Mixes | None,
    ) -> Any:
        check_output_type(output_type)
        check_generators(generator)
        self.executor.turns.check()
        call = self._split(given)
        self._check_step_inputs(call.fixed)
        variant, program = self._choose(call)
        form = form_of(program, output_type)
        inputs = list(self._inputs(variant, program, call))
        step_end = self._step_end(callback_on_step_end)
        latents = form == "latent"
        if mixes is not None:
            self._shelf.check_count(mixes, variant.batch_size)

        def ready(full: Program) -> Program:
            fewer = variant.narrowed(full)
            count = self._shelf.ready(mixes, variant.images_per_prompt, list(fewer))
            return fewer.get(count, full)

        made = self.executor(program, inputs, generator, step_end, latents, timeout, allow_nan, ready)
        output = output_of(program, made, form)
        return output if return_dict else tuple(output.values())

    def __repr__(self) -> str:
        """Returns the class, the device, the variants, the first few by name, and whether images are checked."""
        names = [variant.name for variant in self.variants]
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        checked = checks_of(self.variants, self.bundle)
        return f"<{self.class_name}, compiled, on {self.executor.device}: {', '.join(names[:_NAMED])}{more}{checked}>"

    @property
    def rank(self) -> int:
        """Returns which of the processes that run each call together this one is, from 0; 0 for one alone."""
        return 0 if self.executor.group is None else self.executor.group.rank

    @property
    def device(self) -> torch.device:
        """Returns the device on which the pipeline runs."""
        return self.executor.device

    @gated()
    def to(self, *args: Any, **kwargs: Any) -> CompiledPipeline:
        """Returns this pipeline, which stays where it is; any other device or dtype is refused."""
        check_device(self.device, args, kwargs)
        return self

    def set_progress_bar_config(self, **config: Any) -> None:
        """Does nothing for `disable=True`: a compiled call shows no bar. Any other setting is refused."""
        if config != {"disable": True}:
            raise CallError("set_progress_bar_config: a compiled call shows no bar. Use callback_on_step_end")

    @property
    def interrupt(self) -> Interrupt:
        """Ends the call that runs after its step: `pipe.interrupt()`, from a callback or another thread.

        The steps that are left are skipped, and the latents as they are become the result. `interrupt()` returns False
        where no call runs, and raises `CallError` where the call cannot be cut short. As in diffusers,
        `pipe._interrupt = True` does the same, and `if pipe.interrupt` asks whether it was done.
        """
        return Interrupt(self.executor)

    @property
    def _interrupt(self) -> bool:
        return bool(self.interrupt)

    @_interrupt.setter
    def _interrupt(self, value: bool) -> None:
        self.interrupt.set(bool(value))

    @gated()
    def preview(self, output_type: str = OWN) -> Any:
        """Returns the pictures of the step that has just ended, from within `callback_on_step_end`.

        The bundle's own decoder makes them of that step's latents, as if the step were the last one; the call then goes
        on as if nobody had asked. Each preview takes the time of one decoding.

        Args:
            output_type: "pil", "np" or "pt"; by default as in a call.

        Raises:
            CallError: no step has just ended, or this pipeline's latents cannot be decoded before the last one.
        """
        check_output_type(output_type)
        if output_type == "latent":
            raise CallError("preview: the callback is given the latents. Choose 'pil', 'np' or 'pt'")
        program, made = self.executor.preview()
        return output_of(program, made, form_of(program, output_type))

    @gated()
    def close(self, timeout: float | None = PATIENCE) -> None:
        """Lets go of weights, graphs, threads, descriptors and temporary files, once the call that runs has ended.

        Calls that wait for their turn are refused at once, and so is every later one.

        Args:
            timeout: seconds to wait for the call that runs; None waits for ever.

        Raises:
            Busy: it did not end within `timeout`; the pipeline stays closed to calls, and `close` can be tried again.
            CallError: a callback of this pipeline's own call closes it.
        """
        self.executor.turns.close(timeout)
        if self.executor.graphs is not None:
            self.executor.graphs.close()
        if self.executor.group is not None:
            self.executor.group.close()
        self.executor.store.close()
        self.bundle.close()

    def __enter__(self) -> CompiledPipeline:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- choosing --

    def _split(self, given: Mapping[str, Any]) -> _Call:
        """Splits a call's arguments into texts, images, tensors and the rest."""
        images = {keyword for variant in self.variants for keyword in variant.images}
        texts = {PROMPT, NEGATIVE, *(keyword for variant in self.variants for keyword in variant.texts)}
        tensors = {keyword for variant in self.variants for keyword in variant.tensors} | {LATENTS}
        call = _Call()
        for name, value in given.items():
            if name in texts:
                if value is not None:
                    call.texts[name] = _texts(name, value)
            elif name in images:
                if value is not None:
                    call.images[name] = image_list(name, value)
            elif name in tensors:
                if value is not None:
                    call.tensors[name] = value
            else:
                call.fixed[name] = value
        return call

    def _choose(self, call: _Call) -> tuple[CompiledVariant, Program]:
        refused, miscounts = "", list[Miscount]()
        # Arrays compare by element, and are no word of an error.
        plain = {k: v.tolist() if isinstance(v, np.ndarray | torch.Tensor) else v for k, v in call.fixed.items()}
        others = {keyword: value for keyword, value in plain.items() if keyword != _STEP_INPUTS}
        # Of those that take any guidance scale, one may be for scales that turn guidance off.
        for variant in sorted(self.variants, key=lambda variant: not variant.in_range(others)):
            if variant.fits(call.texts) and all(variant.agrees(k, v) for k, v in others.items()):
                reason = variant.text_refusal(call.texts)
                reason = reason or variant.image_refusal(call.images) or variant.tensor_refusal(call.tensors)
                if not reason:
                    program = self._program(variant, call)
                    miscount = self._miscount(variant, program, call)
                    if miscount is None:
                        return variant, program
                    miscounts.append(miscount)
                refused = refused or reason
        if miscounts:
            raise CallError(counts_refusal(miscounts))
        raise CallError(refused or self._no_variant(call, others))

    def _miscount(self, variant: CompiledVariant, program: Program, call: _Call) -> Miscount | None:
        """Returns which prompt has another number of tokens than the variant takes; None if none has."""
        if not variant.counts_tokens:
            return None
        complete = self._prompts(variant, program, call)
        found = (self._text.miscounted(text, complete) for text in program.texts)
        return next(filter(None, found), None)

    def _prompts(self, variant: CompiledVariant, program: Program, call: _Call) -> dict[str, list[str]]:
        own = {keyword: texts for keyword, texts in call.texts.items() if keyword not in variant.fixed}
        return with_defaults(program, own, variant.batch_size)

    def _no_variant(self, call: _Call, others: Mapping[str, Any]) -> str:
        known = {name for variant in self.variants for name in variant.fixed if variant.fixed[name] is not None}
        strange = {k: v for k, v in call.fixed.items() if k not in known and v is not None}
        if reason := next(untaken(self.class_name, strange), ""):
            return reason
        shown = {keyword: described(call.fixed[keyword]) for keyword in others}
        batch = len(call.texts.get(PROMPT, ())) or None
        return no_variant(self.class_name, self.variants, batch, others, _CALLERS, shown)

    def _program(self, variant: CompiledVariant, call: _Call) -> Program:
        negative = any(map(is_negative, call.texts)) and Given(negative=True).name in variant.programs
        latents = LATENTS in call.tensors and LATENTS not in tensor_inputs(variant.programs["call"].inputs)
        name = Given(negative, latents).name
        if name not in variant.programs:
            raise CallError(
                f"latents: this bundle was not compiled to take them (it has {', '.join(variant.programs)})"
            )
        return variant.programs[name]

    # -- inputs --

    def _inputs(self, variant: CompiledVariant, program: Program, call: _Call) -> Iterator[Any]:
        complete = self._prompts(variant, program, call)
        tokens = [self._text.encode(text, complete) for text in program.texts]
        wanted = tensor_inputs(program.inputs)
        tensors = {keyword: tensor_list(keyword, call.tensors[keyword], items) for keyword, items in wanted.items()}
        for item in program.inputs:
            source = item.source
            if source["kind"] == "tokens":
                value: Any = tokens[source["text"]][source["key"]]
            elif source["kind"] == "scalar":
                value = _scalar(item.source, call.fixed)
            elif source["kind"] == "image":
                value = pixels(source, item.type.shape, call.images[source["keyword"]])
            else:
                value = tensors[source["keyword"]][source.get("index", 0)]
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


def text_end(pipe: CompiledPipeline) -> TextEnd:
    """Returns what turns the prompts of a pipeline into tokens."""
    return pipe._text


def _texts(keyword: str, value: Any) -> list[str]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) for text in texts):
        raise CallError(f"{keyword}: {reprlib.repr(value)} is neither a string nor a list of strings")
    for text in texts:
        if not text.isascii() and _SURROGATE.search(text):
            raise CallError(f"{keyword}: {text[:40]!r} holds half of a character (a surrogate). Decode it as UTF-8")
    return list(texts)


def with_defaults(program: Program, prompts: Mapping[str, list[str]], batch: int) -> dict[str, list[str]]:
    """Returns the prompts with missing ones filled in as diffusers does: prompt_2 is prompt, a negative prompt is
    empty.
    """
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
        raise CallError(f"{source['keyword']}: {reprlib.repr(value)} is not a number") from None
    if "above" in source and value <= source["above"]:
        raise CallError(
            f"{source['keyword']}: {value} turns guidance off, which is another program. Compile a variant with it"
        )
    return value
