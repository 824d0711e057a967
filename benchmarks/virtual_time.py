"""The least time of a call on one GPU and on several, from full-size configurations alone: no weight is read.

    python benchmarks/virtual_time.py [CASE ...]

Every process's program is walked line by line in virtual time (diffkiln/program/clocks.py). Prints Markdown.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from measuring import machine, table

from diffkiln.compiler.compile import shared_calls_of
from diffkiln.compiler.planning import SharedCall
from diffkiln.evaluate.ceilings import ceilings_of, link_of
from diffkiln.program.clocks import LATENCY, Link
from diffkiln.program.work import Ceilings
from diffkiln.spec import TARGETS

GPU = "nvidia-h100-sxm"
#: Bytes a second in one direction. What NCCL reaches of NVLink: https://github.com/NVIDIA/nccl-tests/issues/212.
LINKS = {
    "NVLink, 450 GB/s": Link(450e9),
    "NVLink as NCCL reaches it, 370 GB/s": Link(370e9),
    "the same, 6 µs": Link(370e9, 6e-6),
    "PCIe 5 x16, 63 GB/s": Link(63e9),
}
#: The share of the data sheet's arithmetic that products and attention reach.
SHARES = (1.0, 0.7)

FLUX = {"height": 1024, "width": 1024, "num_inference_steps": 28, "guidance_scale": 3.5}
WAN = {"num_frames": 81, "num_inference_steps": 50, "guidance_scale": 5.0}
HOIST = [{"name": "hoist", "component": "transformer"}]
ENCODERS = ["text_encoder", "text_encoder_2"]
#: By name: the architecture, its inputs, passes, how processes share the call, and how many times as fast it shall be.
CASES: dict[str, tuple[str, dict[str, Any], list[dict[str, Any]], dict[str, Any], float]] = {
    "flux-guidance": ("flux.1-dev", FLUX | {"call": {"true_cfg_scale": 3.0}}, [], {"guidance": 2}, 1.8),
    "flux-sequence": ("flux.1-dev", FLUX, [], {"sequence": 4}, 3.0),
    "flux-hoist-sequence": ("flux.1-dev", FLUX, HOIST, {"sequence": 4}, 3.0),
    "flux-sequence-first": ("flux.1-dev", FLUX, [], {"sequence": 4, "first": ENCODERS}, 3.0),
    "flux-both": ("flux.1-dev", FLUX | {"call": {"true_cfg_scale": 3.0}}, [], {"guidance": 2, "sequence": 2}, 3.0),
    "wan-480p-guidance": ("wan2.1-t2v-14b", WAN | {"height": 480, "width": 832}, [], {"guidance": 2}, 1.8),
    "wan-480p-sequence": ("wan2.1-t2v-14b", WAN | {"height": 480, "width": 832}, [], {"sequence": 4}, 3.0),
    "wan-720p-guidance": ("wan2.1-t2v-14b", WAN | {"height": 720, "width": 1280}, [], {"guidance": 2}, 1.8),
    "wan-720p-sequence": ("wan2.1-t2v-14b", WAN | {"height": 720, "width": 1280}, [], {"sequence": 4}, 3.0),
}


#: FLUX.1-dev with its layers on several GPUs, or on one to which weights come: sides of the image, and GB of memory.
LAYERED, LAYERED_GPU, SIDES, COUNTS, MEMORY = "layers", "nvidia-rtx-4090", (1024, 512), (2, 4), (24, 16, 12, 8)


def spec(architecture: str, inputs: dict[str, Any], passes: list[dict[str, Any]], shared: dict[str, Any]) -> Any:
    return {
        "spec_version": 1,
        "source": {"architecture": architecture, "seed": 0},
        "target": {"device": "cuda", "gpu": GPU, "parallel": shared},
        "inputs": inputs,
        "passes": passes,
    }


def ceilings(share: float) -> Ceilings:
    found = ceilings_of(TARGETS[GPU])
    return replace(found, flops={bits: share * flops for bits, flops in found.flops.items()})


def rows(name: str, call: SharedCall, goal: float) -> Iterator[tuple[str, ...]]:
    for share in SHARES:
        for link, numbers in LINKS.items():
            alone, together = call.clocks(ceilings(share), numbers)
            times = alone.now / together.now
            yield (
                name, f"{share:.0%}", link, f"{alone.now:.2f}", f"{together.now:.2f}",
                f"**{times:.2f}**" if times >= goal else f"{times:.2f}", f"{together.exchanging:.2f}",
                f"{together.exchanging / together.now:.0%}", f"{goal}",
            )  # fmt: skip


def layered() -> Iterator[tuple[str, ...]]:
    """Yields, for each size of image, the least seconds on several GPUs, and on one within so much memory."""
    target = TARGETS[LAYERED_GPU]
    known, link = ceilings_of(target), link_of(target)
    assert link is not None, "the link of a GPU is known"
    for side in SIDES:
        for count in COUNTS:
            shared = {"layers": count, "first": ENCODERS}
            made = spec("flux.1-dev", FLUX | {"height": side, "width": side}, [], shared)
            made["target"]["gpu"] = LAYERED_GPU
            (programs,) = shared_calls_of(made).values()
            call = programs["call"]
            _, together = call.clocks(known, link)
            within = [call.streamed(known, int(size * 1e9)) for size in MEMORY]
            yield (
                f"{side} × {side}", f"{count}", f"{together.now:.2f}", f"{together.exchanging:.2f}",
                f"{call.exchanged[1].nbytes / 1e6:,.1f}", ", ".join(f"{size / 1e9:.1f}" for size in call.held),
                *("does not fit" if seconds is None else f"{seconds:.2f}" for seconds in within),
            )  # fmt: skip


def print_layered() -> None:
    heads = ("image", "GPUs", "with layers, s", "exchanging, s", "MB sent in a step", "GB of weights held")
    print(table((*heads, *(f"one of {size} GB, s" for size in MEMORY)), list(layered())))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"Of {', '.join([*CASES, LAYERED])} (default: all).")
    chosen = parser.parse_args().cases or [*CASES, LAYERED]
    print(f"# Several GPUs in virtual time\n\n{machine()}\n\n{GPU}, {LATENCY * 1e6:.0f} µs for each exchange.\n")
    times, sent = [], []
    for name in chosen:
        if name == LAYERED:
            continue
        architecture, inputs, passes, shared, goal = CASES[name]
        began = time.perf_counter()
        (programs,) = shared_calls_of(spec(architecture, inputs, passes, shared)).values()
        print(f"{name}: {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
        key = "call+negative" if "guidance" in shared else "call"
        call = programs.get(key) or next(iter(programs.values()))
        times += rows(name, call, goal)
        alone, _ = call.clocks(ceilings(1.0), Link(450e9))
        first, one, last = call.exchanged[0], call.exchanged[1], call.exchanged[-1]
        held = [f"{size / 1e9:.1f}" for size in call.held[:2]]
        amounts = [f"{each.nbytes / 1e6:,.1f}" for each in (first, one, last)]
        sent.append((name, f"{alone.step or 0:.4f}", *amounts, f"{one.count}", *held))
    heads = ("case", "arithmetic", "link", "one, s", "several, s", "times", "exchanging, s", "share", "goal")
    print(table(heads, times))
    print()
    heads = (
        "case", "a step on one, s", "MB sent in the first step", "in another", "after the last", "exchanges of a step",
        "GB of weights, first process", "each other",
    )  # fmt: skip
    print(table(heads, sent))
    if LAYERED in chosen:
        print()
        print_layered()


if __name__ == "__main__":
    main()
