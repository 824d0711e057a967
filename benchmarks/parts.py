"""What compiling more than the blocks saves, and what guidance in one call saves, on the digits pipeline.

    python benchmarks/parts.py [--runs 20]

One process holds all bundles; they take turns, forwards and backwards. Prints Markdown tables.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from measuring import DIGITS, machine, median, spread, table

import diffkiln

Passes = Sequence[dict[str, Any]]
FUSED = {"name": "fuse_qkv", "component": "transformer"}
BLOCKS = {"name": "compile", "component": "transformer"}
WHOLE = {"scope": "whole"}
#: Each adds to what is compiled.
PARTS: Mapping[str, Passes] = {
    "nothing compiled": [FUSED],
    "blocks": [FUSED, BLOCKS],
    "blocks and what lies between": [FUSED, BLOCKS | {"between": True}],
    "the whole transformer": [FUSED, BLOCKS | WHOLE],
    "blocks; the VAE whole": [FUSED, BLOCKS, {"name": "compile", "component": "vae"} | WHOLE],
    "blocks; text encoders whole": [
        FUSED,
        BLOCKS,
        {"name": "compile", "component": "text_encoder"} | WHOLE,
        {"name": "compile", "component": "text_encoder_2"} | WHOLE,
    ],
    "blocks; the scheduler's arithmetic": [FUSED, BLOCKS, {"name": "compile", "component": "scheduler"}],
}
#: With true guidance: a step calls the transformer twice, or once with both.
GUIDED: Mapping[str, Passes] = {
    "two calls a step": [FUSED, BLOCKS],
    "one call of a doubled batch": [
        FUSED,
        {"name": "guidance", "component": "transformer", "batch": "doubled"},
        BLOCKS,
    ],
}


def bundles(kinds: Mapping[str, Passes], folder: Path, call: Mapping[str, Any]) -> dict[str, Any]:
    """The pipelines by name, resident."""
    made = json.loads((DIGITS / "spec.json").read_text()) | {"runtime": {}}
    made["inputs"]["call"] |= call
    folder.mkdir()
    return {
        name: diffkiln.load(diffkiln.compile(made | {"passes": list(passes)}, folder / str(index), base=DIGITS).path)
        for index, (name, passes) in enumerate(kinds.items())
    }


def seconds(pipes: Mapping[str, Any], runs: int, **keywords: Any) -> dict[str, list[float]]:
    """Of an image, `runs` for each after 3 that do not count."""
    found: dict[str, list[float]] = {name: [] for name in pipes}
    for index in range(runs + 3):
        for name in list(pipes)[:: 1 if index % 2 == 0 else -1]:
            generator = torch.Generator("cpu").manual_seed(7)
            started = time.perf_counter()
            pipes[name]("a handwritten seven", generator=generator, **keywords)
            if index >= 3:
                found[name].append(time.perf_counter() - started)
    return found


def show(what: str, pipes: Mapping[str, Any], found: Mapping[str, Sequence[float]]) -> None:
    first = median(next(iter(found.values())))
    rows = [
        (
            name,
            len({row.path for row in pipes[name].bundle.manifest.engines}),
            f"{median(values) * 1e3:.1f} ms",
            spread([value * 1e3 for value in values]),
            f"{median(values) / first:.2f}",
        )
        for name, values in found.items()
    ]
    print(table((what, "engines", "median", "spread, ms", "× the first"), rows), end="\n\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20)
    runs = parser.parse_args().segments
    print(f"# What is compiled\n\n{machine()}; {torch.get_num_threads()} threads\n")
    print(f"examples/digits, float32, 8 steps, resident, {runs} runs each after 3.\n")
    with tempfile.TemporaryDirectory() as folder:
        pipes = bundles(PARTS, Path(folder, "parts"), {})
        show("compiled", pipes, seconds(pipes, runs))
        print("True guidance, scale 3, with a negative prompt:\n")
        pipes = bundles(GUIDED, Path(folder, "guided"), {"true_cfg_scale": 3.0})
        show("guidance", pipes, seconds(pipes, runs, negative_prompt="a handwritten one"))


if __name__ == "__main__":
    main()
