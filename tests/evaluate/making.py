"""An evaluation of drawn pictures, without any pipeline."""

from __future__ import annotations

from pathlib import Path

import torch

from diffkiln.compiler.metrics import About
from diffkiln.evaluate.album import Album, Drawn
from diffkiln.evaluate.bench import Bench, Measured, Rounds
from diffkiln.evaluate.calls import Call
from diffkiln.evaluate.comparing import Pairs, drift_of, results_of
from diffkiln.evaluate.numbers import spread_of
from diffkiln.evaluate.prompts import Request
from diffkiln.evaluate.quality import Evaluation
from diffkiln.evaluate.ways import Way
from diffkiln.plugins import load

MACHINE = {"processor": "A processor, 2 cores", "versions": "torch 2", "threads": "2", "load": "0.0", "gpu": "none"}
STRANGE = '</script><img src=x onerror=alert(1)> "three"'


def evaluation(folder: Path, count: int = 3) -> Evaluation:
    """Pictures of coloured waves, the bundle's with a little noise; one prompt is hostile."""
    draw = torch.Generator().manual_seed(0)
    across = torch.linspace(0, 6, 32)
    ours, theirs = Album(folder / "bundle"), Album(folder / "reference")
    requests = tuple(Request("a seven" if number else STRANGE, number) for number in range(count))
    for number in range(count):
        waves = torch.stack([torch.sin(across * (number + part + 1))[:, None] * torch.cos(across) for part in range(3)])
        picture, latents = (waves[None] + 1) / 2, torch.randn(4, 8, generator=draw)
        noise = 0.02 * torch.randn(picture.shape, generator=draw)
        theirs.put(number, Drawn(picture, latents, 0.02))
        ours.put(number, Drawn((picture + noise).clamp(0, 1), latents * 1.01, 0.01))
    about = About(32, 32, 1, count)
    metrics = {name: load("metrics", name) for name in ("psnr", "ssim", "clip_score")}
    rows = tuple(results_of(metrics, Pairs(ours, theirs, requests), about))
    drift = tuple(drift_of(ours, theirs, count))
    ways = tuple(
        Way(name, {"kind": kind}, Call(), {"transformer": size, "vae": 600_000})
        for name, kind, size in (("bundle", "bundle", 2_000_000), ("eager diffusers", "eager", 4_000_000))
    )
    return Evaluation("0" * 64, ways, requests, rows, drift, (), {}, MACHINE, folder)


def bench(count: int = 2) -> Bench:
    """Speed and memory of so many ways."""
    names = ("start", "load", "call", "encode", "denoise", "decode", "step")
    seconds = {name: spread_of([0.25 + 0.1 * place, 0.5]) for place, name in enumerate(names)}
    ways = [Measured(f"way {number}", seconds, spread_of([2.0]), 10**9, None, None) for number in range(count)]
    return Bench("0" * 64, tuple(ways), MACHINE, Rounds(1, 1, 2), {})
