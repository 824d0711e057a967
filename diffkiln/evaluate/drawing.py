"""Draws every request with one pipeline, and keeps pictures and latents of each step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from diffkiln.errors import CallError
from diffkiln.evaluate.album import Album, Drawn
from diffkiln.evaluate.calls import Call, keywords_of
from diffkiln.evaluate.opening import open_way, taken
from diffkiln.evaluate.phases import tells_steps
from diffkiln.evaluate.prompts import Request
from diffkiln.evaluate.ways import Way
from diffkiln.runtime.accelerator import wait


def draw(
    way: Way,
    requests: Sequence[Request],
    album: Album,
    progress: Callable[[str], None],
    around: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> None:
    """Draws the requests that the album lacks.

    Args:
        way: how to draw; it is opened only if something is missing.
        requests: what to draw.
        album: where pictures are kept.
        progress: called with what is drawn.
        around: a context for every call.

    Raises:
        CallError: the result is no picture.
        DiffkilnError: as loading and calling the pipeline raise.
    """
    missing = [number for number in range(len(requests)) if number not in album]
    if not missing:
        return
    progress(f"load {way.name}")
    pipe = open_way(way.job)
    try:
        for numbers in _batches(missing, way.call.batch):
            progress(f"draw {numbers[0] + 1} of {len(requests)}: {way.name}")
            with around():
                made = _drawn(pipe, way.call, [requests[number] for number in numbers])
            for number, drawn in zip(dict.fromkeys(numbers), made, strict=False):
                album.put(number, drawn)
    finally:
        if hasattr(pipe, "bundle"):
            pipe.close()


def _batches(numbers: Sequence[int], size: int) -> Iterator[list[int]]:
    """Yields as many numbers as a call takes; the last one again where there are too few."""
    for first in range(0, len(numbers), size):
        batch = list(numbers[first : first + size])
        yield batch + batch[-1:] * (size - len(batch))


def _drawn(pipe: Any, call: Call, requests: Sequence[Request]) -> list[Drawn]:
    steps: list[torch.Tensor] = []

    def step_end(_pipe: Any, _step: int, _timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        steps.append(values["latents"].detach().float().cpu().clone())
        return {}

    given = keywords_of(call, [item.prompt for item in requests], [item.seed for item in requests])
    if tells_steps(pipe):
        given["callback_on_step_end"] = step_end
    given["output_type"] = "pt"
    device = torch.device(getattr(pipe, "device", "cpu"))
    wait(device)
    begun = time.perf_counter()
    with torch.inference_mode():
        result = pipe(**taken(pipe, given))
    wait(device)
    seconds = time.perf_counter() - begun
    pictures = _pictures(next(iter(result.values())))
    each, latents = len(pictures) // len(requests), _by_picture(steps, len(pictures))
    return [Drawn(pictures[row * each], latents[row * each], seconds) for row in range(len(requests))]


def _pictures(made: Any) -> torch.Tensor:
    """Returns what a call gave as float32 [pictures, frames, 3, height, width]."""
    tensor = torch.stack(list(made)) if isinstance(made, list | tuple) else made
    if not isinstance(tensor, torch.Tensor) or tensor.ndim not in (4, 5):
        raise CallError("the call gives no pictures, so nothing can be compared")
    tensor = tensor.detach().float().cpu()
    frames = tensor.unsqueeze(1) if tensor.ndim == 4 else tensor
    return frames.expand(-1, -1, 3, -1, -1) if frames.shape[2] == 1 else frames[:, :, :3]


def _by_picture(steps: Sequence[torch.Tensor], count: int) -> list[torch.Tensor]:
    """Returns the latents of each picture, [steps, …]; no steps where rows are no pictures or sizes change."""
    alike = bool(steps) and len({step.shape for step in steps}) == 1 and steps[0].shape[0] == count
    return [torch.stack([step[row] for step in steps]) if alike else torch.empty(0) for row in range(count)]
