"""Pairs of weight passes compiled ahead of time: what the engines give against the same bundle without engines.

    python benchmarks/pairs.py

Covers every pass on two small pipelines (the digits, and an SDXL of random weights). Prints a Markdown table.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import DIGITS, machine, table

sys.path.insert(0, str(Path(__file__).parents[1]))

Entry = dict[str, Any]

DIGITS_PAIRS: list[tuple[str, list[Entry]]] = [
    ("fuse_lora, prune", [{"name": "fuse_lora"}, {"name": "prune", "blocks": ["single_transformer_blocks.1"]}]),
    ("fuse_lora, layerwise_cast", [{"name": "fuse_lora"}, {"name": "layerwise_cast"}]),
    ("fuse_qkv, int8_weight_only", [{"name": "fuse_qkv"}, {"name": "quantize", "type": "int8_weight_only"}]),
    ("fuse_qkv, float8_weight_only", [{"name": "fuse_qkv"}, {"name": "quantize", "type": "float8_weight_only"}]),
    ("fuse_qkv, layerwise_cast", [{"name": "fuse_qkv"}, {"name": "layerwise_cast"}]),
    (
        "fuse_qkv, int4_weight_only",
        [{"name": "fuse_qkv"}, {"name": "quantize", "type": "int4_weight_only", "group_size": 32}],
    ),
    (
        "prune, int8_dynamic",
        [{"name": "prune", "blocks": ["transformer_blocks.1"]}, {"name": "quantize", "type": "int8_dynamic"}],
    ),
    (
        "prune, quanto int8",
        [
            {"name": "prune", "blocks": ["transformer_blocks.1"]},
            {"name": "quantize", "backend": "quanto", "type": "int8"},
        ],
    ),
]
SDXL_PAIRS: list[tuple[str, list[Entry]]] = [
    ("merge_tokens, int8_weight_only", [{"name": "merge_tokens"}, {"name": "quantize", "type": "int8_weight_only"}]),
    ("fuse_qkv, channels_last", [{"name": "fuse_qkv"}, {"name": "channels_last"}]),
    ("layerwise_cast, channels_last", [{"name": "layerwise_cast"}, {"name": "channels_last"}]),
    (
        "prune, merge_tokens",
        [{"name": "prune", "blocks": ["down_blocks.1.attentions.0.transformer_blocks.0"]}, {"name": "merge_tokens"}],
    ),
]


def digits_spec(passes: list[Entry]) -> Entry:
    made = json.loads((DIGITS / "spec.json").read_text())
    made["source"]["model"] = str(DIGITS / "model")
    return {**made, "passes": passes, "runtime": {}}


def sdxl_spec(folder: Path, passes: list[Entry]) -> Entry:
    from tests.pipelines import FAMILIES, build_folder

    call = {"num_inference_steps": 3, **FAMILIES["sdxl"].call}
    fixed = {key: call.pop(key) for key in ("height", "width", "num_inference_steps", "guidance_scale") if key in call}
    source = {"model": str(build_folder("sdxl", folder)), "dtype": "float32"}
    inputs = {**fixed, "call": call}
    return {"spec_version": 1, "source": source, "target": {"device": "cpu"}, "inputs": inputs, "passes": passes}


def draw(bundle: Path) -> tuple[np.ndarray, int]:
    """Three images from 0 to 1, and how many engines took part."""
    import diffkiln

    with diffkiln.load(bundle) as pipe:
        images = [
            pipe("seven", generator=torch.Generator().manual_seed(seed), output_type="np").images for seed in range(3)
        ]
        return np.concatenate(images), len(pipe.executor.engines)


def main() -> None:
    import diffkiln
    from diffkiln.models.meta import load_module
    from diffkiln.models.opening import open_source
    from diffkiln.spec import Source
    from tests.passes.adapters import adapter

    print("# Pairs of passes, compiled\n")
    print(machine() + "\n")
    rows = []
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        transformer = load_module(open_source(Source(model=str(DIGITS / "model")), root), "transformer")
        file = adapter(root / "adapter.safetensors", transformer, "transformer", ending="to_k")
        jobs = [("digits", "transformer", *pair) for pair in DIGITS_PAIRS]
        jobs += [("sdxl", "unet", *pair) for pair in SDXL_PAIRS]
        for index, (model, component, pair, entries) in enumerate(jobs):
            passes = [{"component": component, **entry} for entry in entries]
            for entry in passes:
                if entry["name"] == "fuse_lora":
                    entry["adapters"] = [{"file": str(file), "scale": 0.3}]
            images, engines, seconds = [], 0, 0.0
            for engine in (False, True):
                more = [{"name": "compile", "component": component}] if engine else []
                spec = digits_spec(passes + more) if model == "digits" else sdxl_spec(root, passes + more)
                started = time.perf_counter()
                built = diffkiln.compile(spec, root / f"{index}-{engine}")
                seconds = time.perf_counter() - started
                drawn, engines = draw(built.path)
                images.append(drawn)
            gap = float(np.abs(images[0] - images[1]).max())
            rows.append((model, pair, str(engines), f"{gap * 255:.3f} / 255", f"{seconds:.0f}"))
            print(rows[-1], file=sys.stderr, flush=True)
    columns = ("pipeline", "passes", "engines", "largest difference to the bundle without engines", "s to compile")
    print(table(columns, rows))


if __name__ == "__main__":
    main()
