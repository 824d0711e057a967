"""One run of a diffusers pipeline's own `__call__`, without weights, under a tape."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial, wraps
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode_stack

from diffkiln.errors import DataDependent, DiffkilnError, RecordError, SpecError
from diffkiln.interpreter.aten import dtype_name, type_of
from diffkiln.models.added import added_to
from diffkiln.models.weights import weights_of
from diffkiln.program import CALL, NOISE, NORMAL, STEP, Input, Program, TensorType, prune, weight_of_call
from diffkiln.program.images import IMAGES
from diffkiln.program.text_rules import COUNTED
from diffkiln.record.arrays import MarkedArray, arrays_of, marked_array
from diffkiln.record.casts import Casts
from diffkiln.record.components import Callee, call_key, run_shapes
from diffkiln.record.constants import Constants
from diffkiln.record.counted import Counted, decisive, digest_of
from diffkiln.record.images import ImageRecorder, sizes_as_json, twice_the_images
from diffkiln.record.keywords import (
    NEGATIVES,
    PROMPTS,
    Tensors,
    as_json,
    parameters_of,
    takes_images,
    twice_the_tensors,
)
from diffkiln.record.mixed import mixed_processors
from diffkiln.record.outputs import outputs_of
from diffkiln.record.processors import hooks_of, processors_of
from diffkiln.record.reading import Reading
from diffkiln.record.refusals import Refused, code_of, refusal
from diffkiln.record.safety import SafetyRecorder
from diffkiln.record.sentinels import Sizes, sentinels
from diffkiln.record.settings import Switches
from diffkiln.record.structure import flatten, unflatten
from diffkiln.record.tape import Tape
from diffkiln.record.text import TextRecorder, marks_of, refuse_unpadded, sentinel, tokenizer_of

#: The methods of a component that a pipeline calls.
METHODS = ("forward", "encode", "decode")
#: Of the generator that a recorded call is given, by which the tape knows it from others.
_SEED = 0x6B696C6E


@dataclass(frozen=True)
class Request:
    """One variant: the keywords of the pipeline's call that are fixed, the batch, and what else the caller gives.

    Attributes:
        fixed: the keywords that have one value.
        batch_size: the number of prompts.
        images: the width and height of each image, by keyword.
        tensors: the types of tensors, by keyword.
        texts: keywords of texts, besides those of prompts.
        withheld: prompts that are not given, since tensors take their place or the spec fixes them.
        needs_negative: the pipeline cannot be called without a negative prompt.
        tokens: how many tokens the prompts have, by keyword, where their lengths are fixed; without those of the text
            around them.
        all_counted: the length is fixed of every text, and not only where it follows the prompt's: the call reads masks
            of tokens that are padded to a length of their own.
        output: the form of the results that the call is asked for: tensors, or arrays where it gives no tensors.
    """

    fixed: Mapping[str, Any]
    batch_size: int = 1
    images: Mapping[str, Sizes] = field(default_factory=dict)
    tensors: Mapping[str, Tensors] = field(default_factory=dict)
    texts: tuple[str, ...] = ()
    withheld: frozenset[str] = frozenset()
    needs_negative: bool = False
    tokens: Mapping[str, int] | None = None
    all_counted: bool = False
    output: str = "pt"

    def prompts(self, parameters: Mapping[str, Any], negative: bool) -> list[str]:
        """Returns the keywords of texts that the caller of a pipeline with these parameters gives."""
        given = [*PROMPTS, *self.texts, *(NEGATIVES if negative or self.needs_negative else ())]
        return [keyword for keyword in given if keyword in parameters and keyword not in self.withheld]

    def doubled(self) -> Request:
        """Returns the same for twice as many prompts."""
        counted = {"batch_size": 2 * self.fixed["batch_size"]} if "batch_size" in self.fixed else {}
        return replace(
            self,
            fixed={**self.fixed, **counted},
            batch_size=2 * self.batch_size,
            images=twice_the_images(self.images),
            tensors=twice_the_tensors(self.tensors, self.batch_size),
        )


class Unread(RecordError):
    """An error for a given keyword that the call does not read."""


class Failed(RecordError):
    """The pipeline's own code failed, without a reason of its own."""


def _reads_negatives(text: TextRecorder) -> bool:
    return any(row.get("keyword") in NEGATIVES for entry in text.texts for row in entry["rows"])


def _end_that_wants_negatives(text: TextRecorder) -> Callable[..., Any]:
    """Returns a callback at the end of a step that stops the recording if no negative prompt was read by then."""

    def end(pipe: Any, step: int, timestep: Any, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if not _reads_negatives(text):
            raise Unread("the call reads no negative prompt")
        return _step_end(pipe, step, timestep, values)

    return end


class CallRecorder:
    """The recorder of runs of the pipeline's own `__call__`, each on its own tape.

    Args:
        pipe: the meta model.
        fake: the mode of its weights.
        constants: where folded tensors go.
        callees: gets every way in which the runs call a component.
        reading: notes which parts of the pipeline the runs read.
    """

    tape: Tape

    def __init__(
        self,
        pipe: Any,
        fake: FakeTensorMode,
        constants: Constants,
        callees: dict[str, Callee],
        reading: Reading | None = None,
    ) -> None:
        self.pipe, self.callees = pipe, callees
        #: Keys of components whose shapes follow from values → the fewest dimensions of the arguments that decide them.
        self._undecided: dict[str, int] = {}
        self._reading = reading or Reading(pipe, ())
        modules = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
        self._casts, self._switches = Casts(pipe), Switches(pipe)
        self._processors = {name: processors_of(module) for name, module in modules.items()}
        self._hooks = {name: hooks_of(module) for name, module in modules.items()}
        weights = [
            (weight_of_call(name, weight), tensor)
            for name, module in modules.items()
            for weight, tensor in weights_of(module)
        ]
        self._new_tape = partial(Tape, fake, constants, weights, f"the call of {type(pipe).__name__}")

    def run(self, request: Request, extra: Mapping[str, Any], negative: bool, latents: TensorType | None) -> Program:
        """Records one run.

        Args:
            request: the variant.
            extra: keywords beyond those of the request.
            negative: give negative prompts.
            latents: of the latents that the caller gives, if any.

        Raises:
            RecordError: the run cannot be written down.
            Unread: the call does not read the negative prompts that it is given.
        """
        self.tape = self._new_tape()
        self.tape.as_array = marked_array
        keywords = call_keywords(self.pipe, request, negative)
        self.tape.noise, self.tape.callers_seed = self._noise_of, _SEED
        prompts = {
            text: (keyword, index)
            for keyword in request.prompts(parameters_of(self.pipe), negative)
            for index, text in enumerate(_as_list(keywords[keyword]))
        }
        parts = {name: part for name, part in self.pipe.components.items() if part is not None}
        names = {id(tokenizer_of(part)): name for name, part in reversed(parts.items())}
        marks = {name: marks_of(part) for name, part in parts.items()}
        counted = None if request.tokens is None else Counted(request.tokens, request.all_counted)
        text, images = TextRecorder(self.tape, prompts, names, marks, counted), ImageRecorder(self.tape, parts.values())
        if negative and "callback_on_step_end" in keywords:
            keywords["callback_on_step_end"] = _end_that_wants_negatives(text)
        keywords |= {keyword: self._given(keyword, types) for keyword, types in request.tensors.items()}
        if latents is not None:
            keywords["latents"] = self.tape.new_input("latents", latents, {"kind": "tensor", "keyword": "latents"})
        prepared = images.patched() if request.images else contextlib.nullcontext()
        safety = SafetyRecorder(self.tape, self.pipe)
        try:
            with (
                torch.inference_mode(),
                _as_it_was(self.pipe),
                self._patched(text),
                text.active(),
                prepared,
                safety.patched(),
                arrays_of(images.pixels),
                self.tape,
            ):
                result = safety.completed(self.pipe(**keywords | dict(extra)))
        except DiffkilnError:
            raise
        except Exception as error:  # whatever the pipeline's own code raises
            raise _explained(error, self.pipe, request, prompts) from error
        if negative and not _reads_negatives(text):
            raise Unread("the call reads no negative prompt")
        outputs, signature = outputs_of(self.pipe, result, self.tape, request.output)
        program = self.tape.finish("call", outputs, texts=text.entries, signature=signature)
        return _live_inputs(program, images.sources())

    def _given(self, keyword: str, types: Tensors) -> Any:
        """Returns marked tensors that the caller gives, one or a list of them."""
        source = {"kind": "tensor", "keyword": keyword}
        if isinstance(types, TensorType):
            return self.tape.new_input(keyword, types, source)
        return [self.tape.new_input(keyword, each, source | {"index": index}) for index, each in enumerate(types)]

    @contextlib.contextmanager
    def _patched(self, text: TextRecorder) -> Iterator[None]:
        from transformers import PreTrainedTokenizerBase

        tokenize = PreTrainedTokenizerBase.__call__
        decode = PreTrainedTokenizerBase.batch_decode
        with contextlib.ExitStack() as stack:
            for module in modules_with("randn_tensor"):
                stack.enter_context(mock.patch.object(module, "randn_tensor", self._noise))
            stack.enter_context(
                mock.patch.object(
                    PreTrainedTokenizerBase, "__call__", lambda tokenizer, *a, **k: text(tokenizer, tokenize, *a, **k)
                )
            )
            stack.enter_context(
                mock.patch.object(
                    PreTrainedTokenizerBase,
                    "batch_decode",
                    lambda tokenizer, ids, *a, **k: "" if self.tape.is_marked(ids) else decode(tokenizer, ids, *a, **k),
                )
            )
            stack.enter_context(mixed_processors(self.pipe.components.values(), self.tape.is_marked))
            for name, module, method in component_methods(self.pipe):
                original = getattr(module, method)
                module.__dict__[method] = self._component(name, module, method, original)
                stack.callback(module.__dict__.pop, method)
            stack.enter_context(self._casts.watched())
            stack.enter_context(self._switches.watched())
            stack.enter_context(self._reading.watched())
            # diffusers looks through all modules for hooks that move them, at every step; a meta model has none.
            here = property(lambda _: torch.device("cpu"))
            stack.enter_context(mock.patch.object(type(self.pipe), "_execution_device", here, create=True))
            yield

    def _noise(
        self,
        shape: Any,
        generator: Any = None,
        device: Any = None,
        dtype: Any = None,
        layout: Any = None,
        distribution: str = NORMAL,
    ) -> torch.Tensor:
        type_ = TensorType(dtype_name(dtype or torch.get_default_dtype()), tuple(int(size) for size in shape))
        fresh = self.tape.blank(type_)
        attrs: dict[str, Any] = {"shape": list(type_.shape), "dtype": type_.dtype}
        attrs |= {} if distribution == NORMAL else {"distribution": distribution}
        self.tape.emit(NOISE, (), [fresh], attrs=attrs if generator is not None else attrs | {"seeded": False})
        return fresh

    def _noise_of(self, shape: Any, dtype: torch.dtype | None, generator: Any, distribution: str) -> torch.Tensor:
        return self._noise(shape, generator, dtype=dtype, distribution=distribution)

    def _decides_more(self, plain: str, leaves: list[Any]) -> bool:
        """Lets more arguments decide what a component's program is, if there are more: masks first, then lists of
        numbers, which may well be timesteps, so that each step has a program of its own."""
        before = self._undecided.get(plain)
        known = len(decisive(leaves, self.tape.is_marked, before))
        for least in (2, 1):
            more = before is None or least < before
            if more and len(decisive(leaves, self.tape.is_marked, least)) > known:
                self._undecided[plain] = least
                return True
        return False

    def _component(self, name: str, module: torch.nn.Module, method: str, original: Any) -> Any:
        @wraps(original)  # as some pipelines look at the signature
        def called(*args: Any, **kwargs: Any) -> Any:
            given, structure = flatten((args, kwargs))
            arrays = [leaf for leaf in given if isinstance(leaf, MarkedArray)]
            # Some pipelines hand the generator on; a component that draws from it is refused.
            leaves = [None if isinstance(leaf, torch.Generator) else _as_tensor(leaf) for leaf in given]
            cast, settings = self._casts.of(name), self._switches.of(name)
            plain = call_key(name, method, leaves, structure, cast, settings)
            decided = decisive(leaves, self.tape.is_marked, self._undecided.get(plain))
            key = plain + digest_of(decided)
            if key not in self.callees:
                what = f"component {name!r}"
                try:
                    with self._switches.itself():
                        result = run_shapes(module, original, leaves, structure, self.tape, what, decided)
                except DataDependent:
                    if not self._decides_more(plain, leaves):
                        raise
                    return called(*args, **kwargs)
                own, now = self._processors[name], processors_of(module)
                given = {path: processor for path, processor in now.items() if processor is not own.get(path)}
                self.callees[key] = Callee(
                    name,
                    method,
                    module,
                    original,
                    leaves,
                    structure,
                    result,
                    processors=given,
                    hooks={path: each for path, each in hooks_of(module).items() if path not in self._hooks[name]},
                    cast=cast,
                    settings=settings,
                    decided=decided,
                )
            result, shape = self.callees[key].result
            fresh = [self.tape.blank(type_of(leaf)) if isinstance(leaf, torch.Tensor) else leaf for leaf in result]
            arguments = [self.tape.value(leaf) for leaf in leaves if isinstance(leaf, torch.Tensor)]
            outputs = [leaf for leaf in fresh if isinstance(leaf, torch.Tensor)]
            self.tape.emit(CALL, arguments, outputs, attrs={"component": name, "program": key})
            return unflatten([_like_those(leaf, arrays) for leaf in fresh], shape)

        return called


def _as_tensor(leaf: Any) -> Any:
    """Returns a tensor for an array: components are programs on tensors."""
    return leaf.tensor() if isinstance(leaf, MarkedArray) else leaf


def _like_those(leaf: Any, arrays: Iterable[MarkedArray]) -> Any:
    """Returns an array for a component's result that is like an array that it was given."""
    alike = next((array for array in arrays if getattr(leaf, "shape", None) == array.shape), None)
    return leaf if alike is None else MarkedArray(leaf, alike.dtype)


@contextlib.contextmanager
def _as_it_was(pipe: Any) -> Iterator[None]:
    """Afterwards the pipeline has the attributes that it had: some keep what a call made for the next one."""
    before = dict(vars(pipe))
    try:
        yield
    finally:
        vars(pipe).clear()
        vars(pipe).update(before)


def component_methods(pipe: Any) -> Iterator[tuple[str, torch.nn.Module, str]]:
    """Yields (name, module, method) for every entry point of every component; one that a pass adds has one."""
    for name, module in pipe.components.items():
        if isinstance(module, torch.nn.Module):
            for method in ("forward",) if name in added_to(pipe) else METHODS:
                if callable(getattr(module, method, None)):
                    yield name, module, method


def call_keywords(pipe: Any, request: Request, negative: bool) -> dict[str, Any]:
    """Returns the keywords of one recorded call: the fixed ones, and sentinels for the prompts. Results are tensors.

    Raises:
        SpecError: a fixed keyword is not one of the pipeline's call.
    """
    parameters = parameters_of(pipe)
    unknown = [name for name in request.fixed if name not in parameters]
    if unknown:
        raise SpecError(
            f"$.inputs.call: {type(pipe).__name__} has no keyword {unknown[0]!r}; it has {sorted(parameters)}"
        )
    keywords = dict(request.fixed) | sentinels(request.images)
    for keyword in request.prompts(parameters, negative):
        texts = [sentinel(keyword, index) for index in range(request.batch_size)]
        keywords[keyword] = texts[0] if request.batch_size == 1 else texts
    if "output_type" in parameters:
        keywords["output_type"] = request.output
    if "generator" in parameters:
        keywords["generator"] = torch.Generator().manual_seed(_SEED)
    if "callback_on_step_end" in parameters:
        keywords["callback_on_step_end"] = _step_end
    return keywords


def _step_end(pipe: Any, step: int, timestep: Any, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Marks the end of a step, where the runtime calls the user's own callback."""
    tape = next(
        (mode for mode in _get_current_dispatch_mode_stack() if isinstance(mode, Tape)),
        None,
    )
    if tape is None or not tape.is_marked(values["latents"]):
        return {}
    fresh = tape.blank(type_of(values["latents"]))
    # With diffusion forcing each frame has a timestep of its own: the callback is given the noisiest one's.
    attrs = {"step": step, "timestep": float(torch.as_tensor(timestep).max())}
    with _disable_current_modes():
        latents = tape.value(values["latents"])
    tape.emit(STEP, (latents,), [fresh], attrs=attrs)
    return {"latents": fresh}


def modules_with(name: str) -> list[Any]:
    """Returns the modules of diffusers that have something of this name."""
    return [
        module
        for key, module in list(sys.modules.items())
        if key.startswith("diffusers.") and name in getattr(module, "__dict__", {})
    ]


def _as_list(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value or ())


def _explained(error: Exception, pipe: Any, request: Request, sentinels: Iterable[str]) -> RecordError:
    """Returns the error of a recording during which the pipeline's own code raised something."""
    name = type(pipe).__name__
    able = [
        item.name for item in parameters_of(pipe).values() if takes_images(item) and item.name not in request.images
    ]
    hint = f". If it needs images, name them in inputs.call: {{{json.dumps(able[0])}: {{}}}}" if able else ""
    if reason := refusal(error, list(sentinels)):
        return Refused(f"{name} refuses this call: {reason}{hint if 'image' in reason.lower() else ''}")
    code = code_of(error) or "its code"
    return Failed(f"{name} fails in {code}, and gives no reason. An input that it needs may be missing{hint}")


def _live_inputs(program: Program, images: Mapping[str, Mapping[str, Any]]) -> Program:
    """Keeps the texts and inputs that the program uses; refuses texts whose length follows the prompt.

    Args:
        program: as recorded.
        images: by the name of an input, what its source says besides.
    """
    used = set(program.uses())
    inputs = [item for item in program.inputs if item.name in used or item.source.get("kind") == "tensor"]
    live = {item.source["text"] for item in inputs if item.source.get("kind") == "tokens"}
    # The lengths of others decided the shapes of what was recorded, too.
    live |= {index for index, text in enumerate(program.texts) if COUNTED in text}
    refuse_unpadded(list(program.texts), live)  # type: ignore[arg-type]
    order = {old: new for new, old in enumerate(sorted(live))}

    def moved(item: Input) -> Input:
        if item.source.get("kind") != "tokens":
            return replace(item, source={**item.source, **images.get(item.name, {})})
        return replace(item, source={**item.source, "text": order[item.source["text"]]})

    texts = tuple(program.texts[index] for index in sorted(live))
    return prune(replace(program, inputs=tuple(moved(item) for item in inputs), texts=texts))


def defaults(pipe: Any, request: Request) -> dict[str, Any]:
    """Returns every fixed keyword of a variant's call: the spec's values over the pipeline's own defaults.

    An image's keyword has its size in pixels, and a tensor's its shape.
    """
    skipped = {*PROMPTS, *NEGATIVES, *IMAGES, *request.texts}
    skipped |= {"generator", "latents", "output_type", "return_dict", "callback_on_step_end"}
    fixed: dict[str, Any] = {}
    for name, parameter in parameters_of(pipe).items():
        plain = isinstance(parameter.default, (bool, int, float, str, list, tuple, type(None)))
        if name not in skipped and plain and parameter.default is not parameter.empty and "callback" not in name:
            fixed[name] = list(parameter.default) if isinstance(parameter.default, tuple) else parameter.default
    return fixed | dict(request.fixed) | sizes_as_json(request.images) | as_json(request.tensors)
