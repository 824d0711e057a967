"""What is frozen of every version: a pipeline and a spec for each kind of bundle, and the requests that it answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
from PIL import Image

from tests.coverage.calls.measure import spec_of
from tests.frozen.tiny import TINY
from tests.pipelines import FAMILIES

#: A T5 encoder, a denoiser of two blocks and a VAE, all of width 32.
FAMILY = "pixart_sigma"
SPEC: dict[str, Any] = {
    "spec_version": 1,
    "source": {"model": "source", "dtype": "float32"},
    "target": {"device": "cpu", "isa": "x86-64-v3"},
    "inputs": {
        "height": 64,
        "width": 64,
        "num_inference_steps": 2,
        "guidance_scale": 4.5,
        "call": {"max_sequence_length": 32, "clean_caption": False, "use_resolution_binning": False},
    },
    "passes": [{"name": "fuse_qkv", "component": "transformer"}],
    "runtime": {"offload": {"strategy": "group", "type": "block_level", "num_blocks_per_group": 1}},
}
COMPILE = {"name": "compile", "component": "transformer", "backend": "aot_inductor", "scope": "blocks"}


@dataclass(frozen=True)
class Kind:
    """A pipeline, and the spec that compiles it out of the folder `source` beside the spec."""

    build: Callable[[], Any]
    spec: dict[str, Any]

    def save(self, room: Path) -> Path:
        """Writes the pipeline and the spec under `room`, and returns the spec's path."""
        self.build().save_pretrained(room / "source", safe_serialization=True)
        file = room / "spec.json"
        file.write_text(json.dumps(self.spec, indent=1) + "\n")
        return file


def of(name: str, *passes: dict[str, Any], inputs: tuple[dict[str, Any], ...] = ({},), **call: Any) -> Kind:
    """Returns the kind of one of the smallest pipelines: with these passes, and these inputs one variant each."""
    spec = spec_of(TINY[name], Path("source"))
    spec["inputs"]["call"] |= call
    each = [spec["inputs"] | more for more in inputs]
    spec |= {"source": SPEC["source"], "target": SPEC["target"], "passes": list(passes)}
    return Kind(TINY[name].build, spec | {"inputs": each if len(each) > 1 else each[0]})


QUANTIZE = {"name": "quantize", "component": "transformer", "backend": "torchao", "type": "int8_weight_only"}
#: A schedule that diffusers' own hook computes as well.
CACHE = {"name": "cache_schedule", "component": "transformer", "method": "taylorseer", "interval": 2, "order": 1}
SIZES = ({"height": 64, "width": 64}, {"height": 64, "width": 96})

KINDS: dict[str, Kind] = {
    "data": Kind(FAMILIES[FAMILY].build, SPEC),
    "engine": Kind(FAMILIES[FAMILY].build, SPEC | {"passes": [*SPEC["passes"], COMPILE]}),
    "quantized": of("flux", QUANTIZE),
    "cached": of("flux", CACHE, inputs=({"num_inference_steps": 3},)),
    "variants": of("pixart", inputs=SIZES),
    "controlnet": of("sdxl_controlnet"),
    "qwen_image": of("qwen_image", negative_prompt=" "),
    "longcat_image": of("longcat_image"),
}


#: Prompts of those that take a prompt apart; the others are asked for `PROMPT`.
PROMPTS = {"longcat_image": "a kiln at night with a sign that says \"Fox\" and 'it isn't'"}
PROMPT = "a kiln at night"


def requests(name: str, spec: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the keywords of a call for each of a kind's inputs, with noise for each image that they take."""
    rows = spec["inputs"] if isinstance(spec["inputs"], list) else [spec["inputs"]]
    made = [{key: value for key, value in row.items() if key != "call"} | row["call"] for row in rows]
    images = [{key: noise(call) for key, value in call.items() if value == {}} for call in made]
    return [{"prompt": PROMPTS.get(name, PROMPT), **call, **given} for call, given in zip(made, images, strict=True)]


def noise(keywords: dict[str, Any]) -> Image.Image:
    """Returns an image of the size that is drawn."""
    shape = keywords["height"], keywords["width"], 3
    return Image.fromarray(numpy.random.default_rng(7).integers(0, 256, shape, numpy.uint8))
