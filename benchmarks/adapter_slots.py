"""Adapters in slots: how long a swap takes, and what the slots cost in each call.

    python benchmarks/adapter_slots.py [--runs 5] [--side 32] [--layers 8] [--width 1024] [--rooms 16x2 64x4]
        [--compiled]

The bundles are the FLUX-like transformer of adapters.py, about 300 million random float32 weights, without slots and
with slots of each size, called in turn with no adapter, with one, and with as many as there are slots. `--compiled`
lowers the blocks by aot_inductor. Prints Markdown tables.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from adapters import CALL, LAYERS, adapter, saved, seconds
from measuring import machine, median, spread, table

import diffkiln
from diffkiln.runtime.adapters.slots import slots_of

PLAIN = "without slots"


def spec_of(model: Path, side: int, room: str, compiled: bool) -> dict[str, Any]:
    spec: dict[str, Any] = {
        "spec_version": 1,
        "source": {"model": str(model), "dtype": "float32"},
        "target": {"device": "cpu"},
        "inputs": {"height": side, "width": side, "num_inference_steps": 1, "guidance_scale": 1.0, **CALL},
        "passes": [{"name": "fuse_qkv", "component": "transformer"}],
    }
    if compiled:
        spec["passes"].append({"name": "compile", "component": "transformer"})
    if room != PLAIN:
        rank, slots = map(int, room.split("x"))
        spec["runtime"] = {"adapters": {"rank": rank, "slots": slots, "include": [f"*.{name}" for name in _fused()]}}
    return spec


def _fused() -> list[str]:
    """Returns the layers that the adapters change, by the names that they have after their projections are fused."""
    return ["attn.to_qkv", *(layer for layer in LAYERS if layer.rpartition(".")[2] not in ("to_q", "to_k", "to_v"))]


def timed(pipes: Mapping[str, Any], files: Mapping[str, list[Path]], runs: int) -> dict[tuple[str, int], list[float]]:
    """Seconds of a call by bundle and number of adapters, after one of each that does not count."""
    counts = {room: (0, 1, pipe.adapter_slots) if pipe.adapter_slots else (0,) for room, pipe in pipes.items()}
    for room, own in files.items():
        for index in range(pipes[room].adapter_slots):
            pipes[room].load_lora(own[index], name=f"t{index}", scale=0)
    found: dict[tuple[str, int], list[float]] = {}
    for run in range(runs + 1):
        for room, pipe in pipes.items():
            for count in counts[room]:
                generator = torch.Generator().manual_seed(run)
                mix = {f"t{index}": 1.0 for index in range(count)}
                taken = seconds(lambda: pipe("seven", generator=generator, adapters=mix))  # noqa: B023
                if run:
                    found.setdefault((room, count), []).append(taken)
    for room in files:
        for name in list(pipes[room].adapters):
            pipes[room].unload_lora(name)
    return found


def swaps(pipe: Any, files: list[Path], runs: int) -> dict[str, list[float]]:
    """Seconds of each way, after one run of each that does not count. There are more adapters than slots."""
    names = [f"a{index}" for index in range(pipe.adapter_slots + 1)]  # two of them have the same slot
    for name, file in zip(names, files, strict=False):
        pipe.load_lora(file, name=name, scale=0)
    turn = iter(range(10**9))

    def home(name: str) -> int:
        return slots_of([name], pipe.adapter_slots)[name]

    pairs = (pair for pair in combinations(names, 2) if home(pair[0]) == home(pair[1]))
    one, other = next(pairs)

    def another() -> None:
        pipe.set_adapters({(one, other)[next(turn) % 2]: 1.0})

    def same() -> None:
        pipe.set_adapters({next(iter(name for name, scale in pipe.adapters.items() if scale)): 0.5 + next(turn) / 1e9})

    ways: dict[str, Callable[[], Any]] = {
        "another adapter, which is in no slot": another,
        "another scale": same,
        "none": lambda: pipe.set_adapters({}),
        "load_lora": lambda: pipe.load_lora(files[-1], name="new"),
        "unload_lora": lambda: pipe.unload_lora("new"),
    }
    found: dict[str, list[float]] = {}
    for run in range(runs + 1):
        for way, work in ways.items():
            taken = seconds(work)
            if run:
                found.setdefault(way, []).append(taken)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--side", type=int, default=32)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--rooms", nargs="+", default=["16x2", "64x4"])
    parser.add_argument("--compiled", action="store_true")
    args = parser.parse_args()
    told = machine()
    with tempfile.TemporaryDirectory() as name, torch.no_grad(), ExitStack() as stack:
        folder = Path(name)
        count = saved(folder / "model", args.layers, args.width)
        pipes: dict[str, Any] = {}
        sizes: dict[str, int] = {}
        for room in (PLAIN, *args.rooms):
            spec = spec_of(folder / "model", args.side, room, args.compiled)
            bundle = diffkiln.compile(spec, folder / room.replace(" ", "-")).path
            pipes[room] = stack.enter_context(diffkiln.load(bundle))
            sizes[room] = pipes[room].executor.store.bytes_now
        files: dict[str, list[Path]] = {}
        for room in args.rooms:
            rank, slots = map(int, room.split("x"))
            files[room] = [
                adapter(folder / f"{room}-{index}.safetensors", args.layers, args.width, rank)
                for index in range(slots + 2)
            ]
        calls = timed(pipes, files, args.runs)
        ways = {room: (own[0].stat().st_size, swaps(pipes[room], own, args.runs)) for room, own in files.items()}
    how = "blocks by aot_inductor" if args.compiled else "replayed"
    print(f"{told}\n")
    print(
        f"A FLUX-like transformer of {count / 1e6:.0f} million float32 weights, resident, projections fused, {how}; "
        f"pictures of {args.side} × {args.side}; slots in {len(_fused()) * args.layers} layers. {args.runs} runs, in "
        "turn.\n"
    )
    base = median(calls[PLAIN, 0])
    rows = [
        (room, f"{sizes[room] / 1e6:.0f} MB", count, f"{median(v) * 1e3:.1f} ms", _spread(v), f"{median(v) / base:.2f}")
        for (room, count), v in calls.items()
    ]
    print(table(("rank × slots", "weights", "adapters", "a call", "spread, ms", "× without"), rows))
    for room, (nbytes, found) in ways.items():
        print(f"\nAdapters of {nbytes / 1e6:.1f} MB in slots of {room}:\n")
        print(
            table(
                ("", "median", "spread, ms"), [(w, f"{median(v) * 1e3:.1f} ms", _spread(v)) for w, v in found.items()]
            )
        )


def _spread(values: list[float]) -> str:
    return spread([value * 1e3 for value in values])


if __name__ == "__main__":
    main()
