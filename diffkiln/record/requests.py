"""From a spec's inputs to the keywords of the pipeline's own call."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from diffkiln.errors import Problem, SpecError
from diffkiln.program.images import IMAGES, MAX_SIDE
from diffkiln.record.call import NEGATIVES, PROMPTS, Request
from diffkiln.record.sentinels import Sizes
from diffkiln.spec import Inputs, Spec, as_tuple, suggest

_BY_THE_CALLER = {"generator", "latents", "output_type", "return_dict", "callback_on_step_end", "callback"}
_SIDES = ("height", "width")


def requests_of(spec: Spec, pipe: Any) -> list[Request]:
    """One request for each variant: what is fixed, how many prompts there are, and the sizes of images.

    Raises:
        SpecError: keywords that the pipeline's call does not have, or that belong to whoever calls the bundle.
    """
    known = set(inspect.signature(type(pipe).__call__).parameters) - {"self"}
    problems: list[Problem] = []
    requests: list[Request] = []
    entries = as_tuple(spec.inputs)
    for index, entry in enumerate(entries):
        where = "$.inputs" if len(entries) == 1 else f"$.inputs[{index}]"
        variants = entry.each()
        wrong = list(_image_problems(variants[0], where))
        problems += wrong
        images = {} if wrong else _images(variants[0])
        for name in (*_fixed(variants[0], images, known), *images):
            place = f"{where}.call.{name}" if name in entry.call else f"{where}.{name}"
            if name in _BY_THE_CALLER:
                problems.append(Problem(place, "whoever calls the bundle gives this keyword", "Remove it."))
            elif name not in known:
                hint = suggest(name, known) or f"It takes {', '.join(sorted(known))}."
                problems.append(Problem(place, f"the call of {type(pipe).__name__} has no keyword {name!r}", hint))
        if not wrong:
            requests += [_request(variant, known) for variant in variants]
    if problems:
        raise SpecError(problems=problems)
    return requests


def _request(variant: Inputs, known: set[str]) -> Request:
    images = _images(variant)
    return Request(_fixed(variant, images, known), variant.batch_size, images)


def _fixed(variant: Inputs, images: dict[str, Sizes], known: set[str]) -> dict[str, Any]:
    given = variant.model_dump(mode="json", exclude_none=True)
    call = given.pop("call", {})
    del given["batch_size"]
    if given["num_images_per_prompt"] == 1:
        del given["num_images_per_prompt"]  # every pipeline's default; those for videos have another word
    if images and not known.intersection(_SIDES):  # such a call has the size of its images
        given = {name: value for name, value in given.items() if name not in _SIDES}
    others = {name: value for name, value in call.items() if name not in (*PROMPTS, *NEGATIVES)}
    return given | {name: value for name, value in others.items() if name not in IMAGES or value is None}


def _given(variant: Inputs) -> dict[str, Any]:
    """What stands for images among the keywords."""
    return {name: value for name, value in variant.call.items() if name in IMAGES and value is not None}


def _images(variant: Inputs) -> dict[str, Sizes]:
    """Keyword → the width and height of its image, or of each in its list; the variant's own where none are said."""

    def size(value: Any) -> tuple[int, int]:
        return value.get("width", variant.width), value.get("height", variant.height)

    return {
        name: tuple(map(size, value)) if isinstance(value, list | tuple) else size(value)
        for name, value in _given(variant).items()
    }


def _image_problems(variant: Inputs, where: str) -> Iterator[Problem]:
    for name, value in _given(variant).items():
        listed = value if isinstance(value, list | tuple) else [value]
        if not listed or not all(map(_is_size, listed)):
            reason = "an image is given by whoever calls the bundle, and is said here to come, with its size in pixels"
            hint = f'Write "{name}": {{}}, "{name}": {{"height": 512, "width": 512}}, or a list of them'
            yield Problem(f"{where}.call.{name}", reason, hint)


def _is_size(value: Any) -> bool:
    if not isinstance(value, dict) or set(value) - set(_SIDES):
        return False
    return all(type(side) is int and 0 < side < MAX_SIDE for side in value.values())
