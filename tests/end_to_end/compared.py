"""A spec, compiled as it stands and called, beside diffusers' own pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

import diffkiln
from tests.exporters.regions import engine_cache

CALL = {"height": 64, "width": 64, "num_inference_steps": 2}


def spec_of(source: dict[str, Any], *, call: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    """A spec for a CPU, in float32."""
    inputs = {**CALL, **({"call": call} if call else {})}
    whole = {"dtype": "float32", **source}
    return {"spec_version": 1, "source": whole, "target": {"device": "cpu"}, "inputs": inputs, **more}


def built(spec: dict[str, Any], base: Path, output: Path) -> Path:
    return diffkiln.compile(spec, output, base=base, cache=engine_cache()).path


def drawn(pipe: Any, seed: int = 1, **keywords: Any) -> Any:
    """What a pipeline, diffusers' or a bundle's, gives for a prompt, as numbers."""
    given = {"prompt": "a photo of a cat", **CALL, **keywords}
    return pipe(**given, generator=torch.Generator().manual_seed(seed), output_type="np")


def difference(one: Any, other: Any) -> float:
    return float(np.abs(np.asarray(one) - np.asarray(other)).max())


def differences(bundle: Path, eager: Any, **keywords: Any) -> list[float]:
    """How far a bundle is from diffusers, as a program and as diffusers, for two prompts and two seeds."""
    found = []
    for as_diffusers in (False, True):
        pipe = diffkiln.load(bundle, as_diffusers=as_diffusers)
        for seed, prompt in ((1, "a photo of a cat"), (2, "two dogs in the snow")):
            given = {**keywords, "prompt": prompt}
            wanted = drawn(eager, seed, **given)
            found.append(difference(wanted.images, drawn(pipe, seed, **given).images))
    return found
