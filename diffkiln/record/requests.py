"""From a spec's inputs to the keywords of the pipeline's own call."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from diffkiln.errors import Problem, SpecError
from diffkiln.record.call import Request
from diffkiln.record.keywords import (
    DTYPES,
    NEGATIVES,
    PROMPTS,
    encoded,
    images_in,
    is_image,
    is_size,
    is_tensor,
    is_text,
    parameters_of,
    takes_images,
    tensors_of,
    withheld_by,
)
from diffkiln.record.sentinels import Sizes
from diffkiln.spec import Inputs, Spec, as_tuple, suggest

_BY_THE_CALLER = {"generator", "latents", "output_type", "return_dict", "callback_on_step_end", "callback"}
_SIDES = ("height", "width")
#: Fields of the inputs that are no keywords of the call.
_LENGTHS = ("prompt_tokens", "negative_prompt_tokens")
#: What a spec has to say where the call has it, though most pipelines have a default: a bundle is for these values.
_NEEDED = (*_SIDES, "num_inference_steps")

Parameters = Mapping[str, inspect.Parameter]


def requests_of(spec: Spec, pipe: Any) -> list[Request]:
    """Returns one request for each variant: what is fixed, the number of prompts, and what else is declared.

    Raises:
        SpecError: keywords that the pipeline's call does not have, that it needs and are not there, or that belong to
            whoever calls the bundle.
    """
    parameters = parameters_of(pipe)
    problems: list[Problem] = []
    requests: list[Request] = []
    for entry, where in zip(as_tuple(spec.inputs), _paths(spec), strict=True):
        variants = entry.each()
        wrong = list(_declaration_problems(variants[0], where, parameters))
        problems += wrong
        if wrong:
            continue
        made = [_request(variant, parameters) for variant in variants]
        problems += _keyword_problems(entry, made[0], where, type(pipe).__name__, parameters)
        requests += made
    if problems:
        raise SpecError(problems=problems)
    return requests


def paths_of_inputs(spec: Spec) -> list[str]:
    """Returns the JSON path of each variant's inputs."""
    entries = zip(as_tuple(spec.inputs), _paths(spec), strict=True)
    return [where for entry, where in entries for _ in entry.each()]


def _paths(spec: Spec) -> list[str]:
    count = len(as_tuple(spec.inputs))
    return ["$.inputs"] if count == 1 else [f"$.inputs[{index}]" for index in range(count)]


def _request(variant: Inputs, parameters: Parameters) -> Request:
    images = _images(variant, parameters)
    tensors = {name: tensors_of(value) for name, value in variant.call.items() if is_tensor(value)}
    given = {name: types for name, types in tensors.items() if types is not None}
    return Request(
        _fixed(variant, images, parameters),
        variant.batch_size,
        images,
        given,
        tuple(name for name, value in variant.call.items() if is_text(value)),
        frozenset(encoded(given)) | frozenset(withheld_by(variant.fixed_prompts or {})),
        tokens=_lengths(variant),
    )


def _lengths(variant: Inputs) -> dict[str, int] | None:
    """Returns how many tokens each prompt has, by keyword; None where no length is fixed."""
    if variant.prompt_tokens is None:
        return None
    texts = [name for name, value in variant.call.items() if is_text(value)]
    found: dict[str, Any] = dict.fromkeys((*PROMPTS, *texts), variant.prompt_tokens)
    if variant.negative_prompt_tokens is not None:
        found |= dict.fromkeys(NEGATIVES, variant.negative_prompt_tokens)
    return found


def _fixed(variant: Inputs, images: Mapping[str, Sizes], parameters: Parameters) -> dict[str, Any]:
    given = variant.model_dump(mode="json", exclude_none=True)
    call, prompts = given.pop("call", {}), given.pop("fixed_prompts", {})
    given = {name: value for name, value in given.items() if name not in _LENGTHS}
    given |= {name: text if variant.batch_size == 1 else [text] * variant.batch_size for name, text in prompts.items()}
    if "batch_size" not in parameters:  # which pipelines without prompts have
        del given["batch_size"]
    if given["num_images_per_prompt"] == 1:
        del given["num_images_per_prompt"]  # every pipeline's default; those for videos have another word
    if images and not parameters.keys() & set(_SIDES):  # such a call has the size of its images
        given = {name: value for name, value in given.items() if name not in _SIDES}
    declared = {name for name, value in call.items() if is_tensor(value) or is_text(value)}
    return given | {
        name: value
        for name, value in call.items()
        if name not in (*PROMPTS, *NEGATIVES, *declared) and not is_image(value, parameters.get(name))
    }


def _images(variant: Inputs, parameters: Parameters) -> dict[str, Sizes]:
    """Returns the width and height of each keyword's image or images; by default the variant's own."""

    def size(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return tuple(map(size, value))
        return None if value is None else (value.get("width", variant.width), value.get("height", variant.height))

    return {
        name: size(value)
        for name, value in variant.call.items()
        if is_image(value, parameters.get(name)) and not is_tensor(value)
    }


def _declaration_problems(variant: Inputs, where: str, parameters: Parameters) -> Iterator[Problem]:
    """Yields what is wrong with that which stands for images and tensors."""
    for name, value in variant.call.items():
        path = f"{where}.call.{name}"
        if is_tensor(value):
            if tensors_of(value) is None:
                hint = f'Write {{"shape": [1, 77, 768], "dtype": "float32"}}; types are {", ".join(DTYPES)}'
                yield Problem(path, "a tensor is declared by its shape, sizes from 1, and its type of elements", hint)
        elif is_image(value, parameters.get(name)):
            listed = images_in(value)
            if not listed or not all(map(is_size, listed)):
                reason = "an image is given by the caller of the bundle, and is said here to come, with its size"
                hint = f'Write "{name}": {{}}, "{name}": {{"height": 512, "width": 512}}, or a list of them'
                yield Problem(path, reason, f"{hint}. A tensor is declared by its shape.")
            elif any(item.get(side, getattr(variant, side)) is None for item in listed for side in _SIDES):
                hint = f'Write "{name}": {{"height": 512, "width": 512}}'
                yield Problem(path, "its size is not said, and the inputs have no height and width", hint)


def _keyword_problems(
    entry: Inputs, request: Request, where: str, class_name: str, parameters: Parameters
) -> Iterator[Problem]:
    """Yields keywords that the call has not, that it needs, and that are the caller's."""
    declared = [*request.images, *request.tensors, *request.texts]
    yield from _prompt_problems(entry, request, where, parameters)
    for name in (*request.fixed, *declared):
        path = _path_of(name, entry, where)
        if name in _BY_THE_CALLER and name not in request.tensors:
            yield Problem(path, "whoever calls the bundle gives this keyword", "Remove it.")
        elif name not in parameters:
            hint = suggest(name, parameters) or f"It takes {', '.join(sorted(parameters))}."
            yield Problem(path, f"the call of {class_name} has no keyword {name!r}", hint)
    given = {*request.fixed, *declared}
    for name, parameter in parameters.items():
        if name in given or (name in (*PROMPTS, *NEGATIVES, *_BY_THE_CALLER) and name != "latents"):
            continue
        if name in _NEEDED:
            yield Problem(f"{where}.{name}", f"the call of {class_name} has it, and it is not said", f'Add "{name}".')
        elif parameter.default is parameter.empty:
            yield Problem(f"{where}.call.{name}", f"the call of {class_name} needs it", _how_to_give(parameter))


def _prompt_problems(entry: Inputs, request: Request, where: str, parameters: Parameters) -> Iterator[Problem]:
    """Yields keywords of fixed prompts that are no prompts, or in whose place tensors are given."""
    taken = frozenset(encoded(request.tensors))
    for name in entry.fixed_prompts or ():
        path = f"{where}.fixed_prompts.{name}"
        if name in parameters and name not in (*PROMPTS, *NEGATIVES):
            yield Problem(path, f"{name!r} is no prompt", f'Whatever else is fixed stands in "call": {{"{name}": …}}.')
        elif name in taken:
            yield Problem(path, f"tensors are given in the place of {name}", "Remove one of the two.")


def _path_of(name: str, entry: Inputs, where: str) -> str:
    inside = next((field for field in ("call", "fixed_prompts") if name in (getattr(entry, field) or ())), "")
    return f"{where}.{inside}.{name}" if inside else f"{where}.{name}"


def _how_to_give(parameter: inspect.Parameter) -> str:
    """Returns what to write for a keyword, as its annotation has it."""
    annotation, name = str(parameter.annotation), parameter.name
    if takes_images(parameter):
        return f'Add "{name}": {{}}, or {{"height": 512, "width": 512}}.'
    if "Tensor" in annotation:
        return f'Add its shape: "{name}": {{"shape": [1, 4, 64, 64], "dtype": "float32"}}.'
    if "str" in annotation and "list[str]" in annotation:
        return f'Add an example: "{name}": {{"text": "a text"}}.'
    return f'Add its value: "{name}": …. Type: {annotation.removeprefix("<class ").strip(chr(39) + ">")}.'
