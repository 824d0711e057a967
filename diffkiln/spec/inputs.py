"""What is fixed in the pipeline's call.

Docstrings and descriptions of fields are those of the JSON Schema, and of the hint where a field is missing.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from pydantic import Field

from diffkiln.spec.problems import refuse
from diffkiln.spec.ranges import MAX_SIZES, Count, Range, Size, Tokens, sizes_of
from diffkiln.spec.strict import MAX_ITEMS, Conflict, Json, Strict, as_tuple


class Inputs(Strict):
    """The fixed inputs of one variant of the pipeline's call, or of one for each size. Sizes are in pixels. A field
    whose keyword the call has not is left out."""

    unknown_field_hint: ClassVar = 'A keyword of the pipeline\'s own call goes into "call"'

    height: Size | None = Field(
        default=None,
        description="Height of the images or frames in pixels, or a range of them. Needed where the call has it.",
    )
    width: Size | None = Field(
        default=None,
        description="Width of the images or frames in pixels, or a range of them. Needed where the call has it.",
    )
    num_frames: Count | None = Field(
        default=None,
        description="Number of frames, for a pipeline that makes videos.",
    )
    batch_size: Count = Field(default=1, description="Number of prompts in one call.")
    num_images_per_prompt: Count = Field(
        default=1,
        description="Number of images (or videos) for each prompt.",
    )
    num_inference_steps: Count | None = Field(
        default=None,
        description="Number of denoising steps. Needed where the call has it.",
    )
    guidance_scale: float | None = Field(
        default=None,
        description="Guidance scale. Absent: the default of the pipeline's own call.",
    )
    fixed_prompts: dict[str, str] | None = Field(
        default=None,
        min_length=1,
        description="Prompts that never change, by the keyword of the call. Callers leave them out, and hoist computes "
        "once what the text encoders make of them.",
    )
    prompt_tokens: Tokens | None = Field(
        default=None,
        description="Numbers of tokens that prompts may have, without the pipeline's own text around them. Each is a "
        "variant. For pipelines whose shapes follow the prompt's length.",
    )
    negative_prompt_tokens: Tokens | None = Field(
        default=None,
        description="The same of negative prompts. Absent: callers give none.",
    )
    call: dict[str, Json] = Field(
        default_factory=dict,
        description="Any other keyword of the pipeline's call. Prompts are examples, images and tensors are declared "
        "by their size or shape, and the others are fixed.",
    )

    @classmethod
    def conflicts(cls, given: Mapping[str, Any]) -> Iterator[Conflict]:
        call, prompts = given.get("call"), given.get("fixed_prompts")
        for name in cls.model_fields:
            if isinstance(call, dict) and name in call:
                yield ("call", name), refuse("has its own field in the inputs", f'Move "{name}" out of "call"')
        for name in prompts if isinstance(prompts, dict) and isinstance(call, dict) else ():
            if name in call:
                yield ("call", name), refuse("is a fixed prompt, too", "Remove one of the two")
        if "negative_prompt_tokens" in given and "prompt_tokens" not in given:
            yield ("negative_prompt_tokens",), refuse("stands beside prompt_tokens alone", 'Add "prompt_tokens"')
        lengths = [given.get(name) for name in ("prompt_tokens", "negative_prompt_tokens")]
        if (pairs := math.prod(len(each) if isinstance(each, list | tuple) else 1 for each in lengths)) > MAX_ITEMS:
            reason = f"the two give {pairs} pairs, and each is recorded; {MAX_ITEMS} are the most"
            yield ("negative_prompt_tokens",), refuse(reason, "Name fewer")
        count = _count(given.get("height")) * _count(given.get("width"))
        if count > MAX_SIZES:
            reason = f"the ranges give {count} sizes, and each is recorded; {MAX_SIZES} are the most"
            yield ("height",), refuse(reason, "Choose larger steps")

    def each(self) -> tuple[Inputs, ...]:
        """Returns one `Inputs` for each size of the ranges and each length of prompts; only itself if there is one."""
        names = ("height", "width", "prompt_tokens", "negative_prompt_tokens")
        lengths = as_tuple(self.prompt_tokens), as_tuple(self.negative_prompt_tokens)
        choices = itertools.product(sizes_of(self.height), sizes_of(self.width), *lengths)
        return tuple(self.model_copy(update=dict(zip(names, choice, strict=True))) for choice in choices)

    @property
    def fixes_the_prompt(self) -> bool:
        """Returns True if callers give no prompt."""
        return "prompt" in (self.fixed_prompts or {})

    @property
    def has_ranges(self) -> bool:
        return isinstance(self.height, Range) or isinstance(self.width, Range)


def _count(size: Any) -> int:
    """Returns how many sizes an unvalidated value stands for."""
    given = [size.get(name) for name in ("min", "max", "step")] if isinstance(size, dict) else []
    numbers = [number for number in given if type(number) is int and number > 0]
    if len(numbers) != 3:
        return 1
    smallest, largest, step = numbers
    return max((largest - smallest) // step + 1, 1)
