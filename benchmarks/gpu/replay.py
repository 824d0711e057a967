"""On one NVIDIA GPU: a program's replay against eager diffusers, with weights resident and streamed.

    python benchmarks/gpu/replay.py [--architecture sd-1.5] [--dtype bfloat16] [--steps 20] [--runs 10] [--rehearse]

Random weights of the true shapes: times and memory mean something, images do not. Prints a Markdown table.
`--rehearse` takes the tests' tiny pipeline of that kind on whatever device there is; its numbers mean nothing.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from measuring import machine, median, spread, table

GPU = torch.cuda.is_available()
#: The tests' tiny pipelines.
TINY = {"sd-1.5": "sd", "sdxl-base-1.0": "sdxl", "flux.1-dev": "flux"}
SIZES = {"sd-1.5": 512, "sdxl-base-1.0": 1024, "flux.1-dev": 1024, "sd3.5-medium": 1024, "pixart-sigma-1024": 1024}


def timed(pipe: Any, call: dict[str, Any], runs: int) -> tuple[list[float], int]:
    """Seconds of each run after three that do not count, and the peak of allocated memory in bytes."""
    seconds = []
    for index in range(runs + 3):
        if index == 3 and GPU:
            torch.cuda.reset_peak_memory_stats()
        generator = torch.Generator("cpu").manual_seed(index)
        synchronize()
        started = time.perf_counter()
        pipe(prompt="a red fox in the snow", generator=generator, output_type="pt", **call)
        synchronize()
        if index >= 3:
            seconds.append(time.perf_counter() - started)
    return seconds, torch.cuda.max_memory_allocated() if GPU else 0


def synchronize() -> None:
    if GPU:
        torch.cuda.synchronize()


#: What a bundle's weights lie on inside a `with` block, given where they wait.
Place = Callable[[str | None], AbstractContextManager[object]]


def policy(offload: str) -> dict[str, Any]:
    return {"strategy": "group", "type": "block_level", "num_blocks_per_group": 1, "use_stream": True, "to": offload}


def measured(
    spec: dict[str, Any], folder: Path, call: dict[str, Any], runs: int, place: Place
) -> Iterator[tuple[str, list[float] | str, int]]:
    """Each way with its seconds, or with what went wrong, and its peak of memory. One that fails costs its own row."""
    import diffkiln

    def built(offload: str | None) -> Path:
        path = folder / str(offload)
        runtime = {"offload": policy(offload)} if offload else {}
        if offload and spec["target"]["device"] == "cpu":
            runtime["offload"]["to"] = "disk"  # a CPU has no other place; the simulated device is told `offload`
        return path if path.exists() else diffkiln.compile(spec | {"runtime": runtime}, path).path

    def eager() -> tuple[list[float], int]:
        pipe = diffkiln.load(built(None), as_diffusers=True)
        pipe.set_progress_bar_config(disable=True)
        return timed(pipe, call, runs)

    def bundle(offload: str | None) -> tuple[list[float], int]:
        with place(offload), diffkiln.load(built(offload)) as pipe:
            return timed(pipe, call, runs)

    ways: dict[str, Callable[[], tuple[list[float], int]]] = {
        "eager diffusers": eager,
        "bundle, resident": lambda: bundle(None),
        "bundle, streamed from host": lambda: bundle("host"),
        "bundle, streamed from disk": lambda: bundle("disk"),
    }
    for name, way in ways.items():
        try:
            yield name, *way()
        except Exception as error:
            yield name, f"failed: {type(error).__name__}: {str(error).partition(chr(10))[0][:200]}", 0
        gc.collect()  # diffusers' pipelines refer to themselves, and would count in the next one's peak
        if GPU:
            torch.cuda.empty_cache()


def shown_row(way: str, seconds: list[float] | str, peak: int, eager: float | None) -> tuple[str, ...]:
    if isinstance(seconds, str):
        return way, seconds, "", "", ""
    ratio = f"{median(seconds) / eager:.2f}" if eager else ""
    return way, f"{median(seconds):.3f} s", spread(seconds), ratio, f"{peak / 1e9:.2f} GB"


def rehearsed(architecture: str, folder: Path) -> dict[str, Any]:
    """Returns what a rehearsal changes in the spec."""
    sys.path.insert(0, str(Path(__file__).parents[2]))
    from tests.pipelines import build_folder

    source = {"model": str(build_folder(TINY[architecture], folder / "models")), "dtype": "float32"}
    return {"source": source} if GPU else {"source": source, "target": {"device": "cpu"}}


def on_simulated(offload: str | None) -> AbstractContextManager[object]:
    """A simulated device, for a rehearsal without a GPU."""
    from tests.simulated import Simulated
    from tests.simulated.whole import weights_on

    return weights_on(Simulated(), policy(offload) if offload else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", choices=SIZES, default="sd-1.5")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args()

    side = SIZES[options.architecture]
    call = {"height": side, "width": side, "num_inference_steps": options.steps, "guidance_scale": 5.0}
    spec: dict[str, Any] = {
        "spec_version": 1,
        "source": {"architecture": options.architecture, "seed": 0, "dtype": options.dtype},
        "target": {"device": "cuda", "gpu": "nvidia-h200"},
        "inputs": call,
    }
    rows = []
    place: Place = lambda _: nullcontext()  # noqa: E731
    with tempfile.TemporaryDirectory() as folder:
        if options.rehearse:
            call |= {"height": 64, "width": 64, "num_inference_steps": 2}
            spec |= rehearsed(options.architecture, Path(folder))
            place = place if GPU else on_simulated
        for name, seconds, peak in measured(spec, Path(folder), call, options.runs, place):
            told = f"{median(seconds):.3f} s, {peak / 1e9:.2f} GB" if isinstance(seconds, list) else seconds
            print(f"{name}: {told}", file=sys.stderr, flush=True)
            rows.append((name, seconds, peak))
    if not any(isinstance(seconds, list) for _, seconds, _ in rows):
        sys.exit("nothing could be measured")
    what = f"{options.architecture}, {options.dtype}, {side}², {options.steps} steps"
    print(f"# Replay on {torch.cuda.get_device_name() if GPU else 'a CPU'}: {what}\n")
    print(f"{machine()}; CUDA {torch.version.cuda}\n")
    eager = rows[0][1]
    shown = [shown_row(*row, median(eager) if isinstance(eager, list) else None) for row in rows]
    print(table(("way", "median", "spread, s", "× eager", "peak allocated"), shown))


if __name__ == "__main__":
    main()
