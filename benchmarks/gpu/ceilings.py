"""What this GPU does at best: products in bf16 and fp8, attention of FLUX's shape, copies from pinned host memory.

    python benchmarks/gpu/ceilings.py --rows DIR [--rehearse]

Each is timed by itself, on random data, and one that fails costs its number alone. Writes DIR/ceilings.json.
`--rehearse` takes small sizes on whatever device there is, to try the machinery; its numbers mean nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass
class Sizes:
    """Of what is timed. FLUX.1-dev at 1024² has 4096 + 512 tokens, and 24 heads of 128 channels."""

    side: int = 8192
    heads: int = 24
    tokens: int = 4608
    channels: int = 128
    copied: int = 4 * 2**30


SIZES = Sizes()
SMALL = Sizes(side=64, heads=2, tokens=32, channels=16, copied=2**20)


def seconds(run: Callable[[], object], times: int = 10) -> float:
    """The median of some runs after three that do not count, by the clock of the GPU, or of the host without one."""
    for _ in range(3):
        run()
    found = []
    for _ in range(times):
        if DEVICE == "cpu":
            began = time.perf_counter()
            run()
            found.append(time.perf_counter() - began)
            continue
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        run()
        last.record()
        last.synchronize()
        found.append(first.elapsed_time(last) / 1e3)
    return statistics.median(found)


def bf16() -> tuple[float, str]:
    a, b = (torch.randn(SIZES.side, SIZES.side, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    return 2 * SIZES.side**3 / seconds(lambda: a @ b) / 1e12, "TFLOP/s"


def fp8() -> tuple[float, str]:
    a, b = (torch.randn(SIZES.side, SIZES.side, device=DEVICE).to(torch.float8_e4m3fn) for _ in range(2))
    one = torch.ones((), device=DEVICE)
    run = lambda: torch._scaled_mm(a, b.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True)  # noqa: E731
    return 2 * SIZES.side**3 / seconds(run) / 1e12, "TFLOP/s"


def attention(kernel: SDPBackend) -> tuple[float, str]:
    q, k, v = (
        torch.randn(1, SIZES.heads, SIZES.tokens, SIZES.channels, device=DEVICE, dtype=torch.bfloat16) for _ in range(3)
    )
    with sdpa_kernel(kernel):
        took = seconds(lambda: functional.scaled_dot_product_attention(q, k, v))
    return 4 * SIZES.heads * SIZES.tokens**2 * SIZES.channels / took / 1e12, "TFLOP/s"


def host_to_device() -> tuple[float, str]:
    host = torch.empty(SIZES.copied, dtype=torch.uint8, pin_memory=DEVICE == "cuda")
    device = torch.empty(SIZES.copied, dtype=torch.uint8, device=DEVICE)
    return SIZES.copied / seconds(lambda: device.copy_(host, non_blocking=True), 5) / 1e9, "GB/s"


def device_to_device() -> tuple[float, str]:
    a, b = (torch.empty(SIZES.copied, dtype=torch.uint8, device=DEVICE) for _ in range(2))
    return 2 * SIZES.copied / seconds(lambda: b.copy_(a)) / 1e9, "GB/s, read and written"


CEILINGS: dict[str, Callable[[], tuple[float, str]]] = {
    "product, bf16": bf16,
    "product, fp8": fp8,
    "attention, flash": lambda: attention(SDPBackend.FLASH_ATTENTION),
    "attention, cuDNN": lambda: attention(SDPBackend.CUDNN_ATTENTION),
    "host to device, pinned": host_to_device,
    "device to device": device_to_device,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args()
    if options.rehearse:
        vars(SIZES).update(vars(SMALL))
    options.rows.mkdir(parents=True, exist_ok=True)
    found = {}
    for name, measure in CEILINGS.items():
        try:
            value, unit = measure()
            found[name] = f"{value:,.0f} {unit}"
            if DEVICE == "cuda":
                torch.cuda.empty_cache()
        except Exception as error:  # whatever it is, the others are measured
            found[name] = f"failed: {type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"
        print(f"{name}: {found[name]}", flush=True)
        (options.rows / "ceilings.json").write_text(json.dumps(found, indent=1))  # the time may run out


if __name__ == "__main__":
    main()
