"""Loading and changing adapters of a loaded bundle, against reading and adding the same bytes.

    python benchmarks/adapters.py [--runs 5] [--layers 8] [--width 1024] [--rank 16]

The bundle is a FLUX-like transformer of about 300 million random float32 weights. It is not compiled, since adapters
change weights, which engines read at each call. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measuring import DIGITS, machine, median, spread, table
from safetensors.torch import load_file, save_file

import diffkiln
from diffkiln.interpreter.quiet import quiet_libraries

CALL = {"call": {"max_sequence_length": 16}}
ONE, BOTH = "reading and adding the bytes, by hand", "reading and adding the bytes of both"
LAYERS = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "ff.net.0.proj", "ff.net.2")


def saved(model: Path, layers: int, width: int) -> int:
    """Saves the pipeline; returns its transformer's number of weights."""
    from diffusers import FluxPipeline

    with quiet_libraries():
        pipe = FluxPipeline.from_pretrained(DIGITS / "model", local_files_only=True)
        config = dict(pipe.transformer.config) | {"num_layers": layers, "num_single_layers": 0}
        config |= {"num_attention_heads": width // 64, "attention_head_dim": 64, "axes_dims_rope": (16, 24, 24)}
        pipe.transformer = type(pipe.transformer).from_config(config)
        pipe.save_pretrained(model)
    return sum(weight.numel() for weight in pipe.transformer.parameters())


def build(folder: Path, layers: int, width: int) -> tuple[Path, int]:
    """Compiles the bundle; returns it and its transformer's number of weights."""
    count = saved(folder / "model", layers, width)
    spec = {
        "spec_version": 1,
        "source": {"model": str(folder / "model"), "dtype": "float32"},
        "target": {"device": "cpu"},
        "inputs": {"height": 32, "width": 32, "num_inference_steps": 1, "guidance_scale": 1.0, **CALL},
        "passes": [{"name": "fuse_qkv", "component": "transformer"}],
    }
    return diffkiln.compile(spec, folder / "bundle").path, count


def adapter(path: Path, layers: int, width: int, rank: int) -> Path:
    """Saves an adapter of all attention and feed-forward layers of the image's stream."""
    state: dict[str, torch.Tensor] = {}
    for block in range(layers):
        for layer in LAYERS:
            key = f"transformer.transformer_blocks.{block}.{layer}"
            inputs = 4 * width if layer == "ff.net.2" else width
            outputs = 4 * width if layer == "ff.net.0.proj" else width
            state[f"{key}.lora_A.weight"] = torch.randn(rank, inputs) * 0.01
            state[f"{key}.lora_B.weight"] = torch.randn(outputs, rank) * 0.01
    save_file(state, path)
    return path


def seconds(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def by_hand(bundle: Path, *files: Path) -> Callable[[], None]:
    """Reads adapters of the same layers, and the weights that they change from their files into their places, and adds
    the products.
    """
    from diffkiln.bundle import open_bundle
    from diffkiln.runtime.tables import read_header

    with open_bundle(bundle) as found, found.verify() as verified:
        rows = [(row.file, *read_header(verified, row.file)[:2]) for row in verified.manifest.weights["transformer"]]
    places: list[tuple[Path, int, torch.Tensor, list[tuple[slice, str]]]] = []
    names = {key.rsplit(".", 2)[0].removeprefix("transformer."): key.rsplit(".", 2)[0] for key in load_file(files[0])}
    for path, entries, offset in rows:
        for name, entry in entries.items():
            layer = name.removesuffix(".weight")
            parts = [(slice(None), names[layer])] if layer in names else []
            if layer.endswith(".to_qkv") and layer.replace("to_qkv", "to_q") in names:
                third = entry.shape[0] // 3
                pairs = enumerate(("to_q", "to_k", "to_v"))
                parts = [(slice(i * third, i * third + third), names[layer.replace("to_qkv", p)]) for i, p in pairs]
            if parts:
                places.append((bundle / path, offset + entry.start, torch.empty(entry.shape), parts))

    def work() -> None:
        read = [load_file(file) for file in files]
        for path, start, weight, parts in places:
            with path.open("rb", buffering=0) as opened:
                opened.seek(start)
                opened.readinto(memoryview(weight.numpy()).cast("B"))
            for rows, key in parts:
                for factors in read:
                    weight[rows].addmm_(factors[f"{key}.lora_B.weight"], factors[f"{key}.lora_A.weight"])

    return work


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--rank", type=int, default=16)
    args = parser.parse_args()
    told = machine()
    with tempfile.TemporaryDirectory() as name, torch.no_grad():
        folder = Path(name)
        bundle, count = build(folder, args.layers, args.width)
        one, two = (adapter(folder / f"{label}.safetensors", args.layers, args.width, args.rank) for label in "ab")
        found = measure(bundle, one, two, args.runs)
        nbytes = one.stat().st_size
    print(f"{told}\n")
    print(
        f"A FLUX-like transformer of {count / 1e6:.0f} million float32 weights, resident, projections fused; adapters "
        f"of rank {args.rank} on {len(LAYERS) * args.layers} layers, {nbytes / 1e6:.1f} MB. {args.runs} runs.\n"
    )
    rows = [
        (
            way,
            f"{median(v) * 1e3:.0f} ms",
            spread([s * 1e3 for s in v]),
            f"{median(v) / median(found[BOTH if way.endswith('both') else ONE]):.2f}",
        )
        for way, v in found.items()
    ]
    print(table(("", "median", "spread, ms", "× by hand"), rows))


def measure(bundle: Path, one: Path, two: Path, runs: int) -> dict[str, list[float]]:
    """Seconds of each way, after one run of each that does not count."""
    found: dict[str, list[float]] = {}
    with diffkiln.load(bundle) as pipe:
        pipe.load_lora(two, name="two", scale=0)
        ways: dict[str, Callable[[], Any]] = {
            ONE: by_hand(bundle, one),
            BOTH: by_hand(bundle, one, two),
            "load_lora": lambda: pipe.load_lora(one, name="one"),
            "set_adapters, another adapter": lambda: pipe.set_adapters({"two": 0.5}),
            "set_adapters, both": lambda: pipe.set_adapters({"one": 1, "two": 1}),
            "unload_lora, one of them": lambda: pipe.unload_lora("one"),
            "set_adapters, none": lambda: pipe.set_adapters({}),
        }
        for run in range(runs + 1):
            for way, work in ways.items():
                taken = seconds(work)
                if run:
                    found.setdefault(way, []).append(taken)
    return found


if __name__ == "__main__":
    main()
