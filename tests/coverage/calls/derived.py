"""Pipelines that need no builder of their own: a class, the components of another pipeline, and what is changed."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import diffusers

import tests.coverage.calls.image_inputs
import tests.coverage.calls.images
import tests.coverage.calls.video_inputs
import tests.coverage.calls.videos  # noqa: F401  (the pipelines of all four are bases)
from tests.coverage import CASES
from tests.coverage.calls.registry import CALLS, call
from tests.coverage.calls.variants import changed

#: From the components of the other pipeline to those that are added or changed.
Parts = Callable[[dict[str, Any]], dict[str, Any]]


def derived(
    name: str,
    kind: str,
    base: str,
    parts: Parts | None = None,
    *,
    settings: Mapping[str, Any] | None = None,
    images: Mapping[str, Any] | None = None,
    video: bool = False,
    without: tuple[str, ...] = (),
    output: str = "pt",
    gives: str = "image",
    **call_: Any,
) -> None:
    """Register a pipeline of class `kind` under `name`.

    Args:
        name: in the table.
        kind: the class in diffusers.
        base: the name of the pipeline whose components and call it has.
        parts: gives components that are added or changed.
        settings: other arguments of the class.
        images: as `Family.images`.
        video: as `Family.video`.
        output: as `Family.output`.
        gives: as `Family.gives`.
        without: keywords of the base's call that this call does not have.
        call_: keywords of its call that are added or changed.
    """
    keywords = {key: value for key, value in (CALLS[base].call | call_).items() if key not in without}

    steps = keywords.pop("num_inference_steps", None)

    @call(name, images=images, video=video, steps=steps, output=output, gives=gives, **keywords)
    def build() -> Any:
        given = CALLS[base].build().components
        given |= parts(given) if parts else {}
        return assembled(kind, given, **(settings or {}))


def assembled(kind: str, components: Mapping[str, Any], **settings: Any) -> Any:
    """A pipeline of this class from those of the components that it has, without a safety checker."""
    pipeline = getattr(diffusers, kind)
    known = inspect.signature(pipeline.__init__).parameters
    given = {"safety_checker": None, "feature_extractor": None, "image_encoder": None, "requires_safety_checker": False}
    given |= {"add_watermarker": False} | dict(components)
    return pipeline(**{key: value for key, value in given.items() if key in known}, **settings)


def model(name: str, **settings: Any) -> Any:
    """A model of the configuration that the coverage of classes has for its class, but for these settings."""
    module = CASES[name].built()[0]
    inner = getattr(module, "vae", module)
    return changed(inner, **settings)
