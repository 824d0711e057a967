"""From a spec's inputs to the keywords of the pipeline's own call."""

from __future__ import annotations

import inspect
from typing import Any

from diffkiln.errors import Problem, SpecError
from diffkiln.record.call import NEGATIVES, PROMPTS, Request
from diffkiln.spec import Inputs, Spec, as_tuple, suggest

_BY_THE_CALLER = {"generator", "latents", "output_type", "return_dict", "callback_on_step_end", "callback"}


def requests_of(spec: Spec, pipe: Any) -> list[Request]:
    """One request for each variant: what is fixed and how many prompts there are.

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
        for name in _fixed(variants[0]):
            place = f"{where}.call.{name}" if name in entry.call else f"{where}.{name}"
            if name in _BY_THE_CALLER:
                problems.append(Problem(place, "whoever calls the bundle gives this keyword", "Remove it."))
            elif name not in known:
                mend = suggest(name, known) or f"It takes {', '.join(sorted(known))}."
                problems.append(Problem(place, f"the call of {type(pipe).__name__} has no keyword {name!r}", mend))
        requests += [Request(_fixed(variant), variant.batch_size) for variant in variants]
    if problems:
        raise SpecError(problems=problems)
    return requests


def _fixed(variant: Inputs) -> dict[str, Any]:
    given = variant.model_dump(mode="json", exclude_none=True)
    call = given.pop("call", {})
    del given["batch_size"]
    if given["num_images_per_prompt"] == 1:
        del given["num_images_per_prompt"]  # every pipeline's default; those for videos have another word
    return given | {name: value for name, value in call.items() if name not in (*PROMPTS, *NEGATIVES)}
