"""The quality that a bundle must keep.

Docstrings and descriptions of fields are those of the JSON Schema, and of the hint where a field is missing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from pydantic import Field

from diffkiln.spec.problems import refuse
from diffkiln.spec.strict import Conflict, Strict

_Text = Annotated[str, Field(min_length=1)]


class Gate(Strict):
    """A metric that must keep a floor, or stay below a ceiling, for the bundle to be published."""

    metric: _Text = Field(description="Name of a metric, such as `psnr`, against the pipeline without any pass.")
    at_least: float | None = Field(default=None, description="Lowest value that is accepted.")
    at_most: float | None = Field(default=None, description="Highest value that is accepted.")
    prompts: _Text = Field(description="Text file, relative to the spec, with one prompt a line.")
    seeds: Annotated[int, Field(ge=1, le=1000)] = Field(default=1, description="Number of pictures of each prompt.")
    backbone: _Text | None = Field(
        default=None,
        description="Folder, relative to the spec, with the model that the metric needs.",
    )

    @classmethod
    def conflicts(cls, given: Mapping[str, Any]) -> Iterator[Conflict]:
        if ("at_least" in given) == ("at_most" in given):
            both = "both are given" if "at_least" in given else "neither is given"
            yield (), refuse(f'needs exactly one of "at_least" and "at_most", and {both}', "Give the one that counts")
