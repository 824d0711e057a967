"""The table of families and what every one of them goes through: seeded construction and seeded weights."""

import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Family:
    """One tiny pipeline: how to build it, the call keywords (prompt and generator apart) that suit it, the images and
    tensors that its call takes, as a spec says them, the `output_type` that gives numbers, and what its call makes."""

    name: str
    build: Callable[[], Any]
    call: dict[str, Any]
    video: bool = False
    images: Mapping[str, Any] = field(default_factory=dict)
    output: str = "pt"
    gives: str = "image"


FAMILIES: dict[str, Family] = {}


def family(
    name: str,
    *,
    video: bool = False,
    images: Mapping[str, Any] | None = None,
    steps: int | None = 3,
    output: str = "pt",
    gives: str = "image",
    table: dict[str, Family] = FAMILIES,
    **call: Any,
):
    """Register the decorated function, which returns a pipeline with whatever weights, under `name`.

    `steps` is None where the pipeline's call has no number of steps.
    """

    def register(construct: Callable[[], Any]) -> Callable[[], Any]:
        if name in table:
            raise ValueError(f"the family {name!r} is registered twice")

        def build() -> Any:
            seed = zlib.crc32(name.encode())
            with seeded(seed):
                pipe = construct()
            randomise(pipe, seed)
            pipe.set_progress_bar_config(disable=True)
            return pipe

        counted = {"num_inference_steps": steps} if steps else {}
        table[name] = Family(name, build, counted | call, video, images or {}, output, "video" if video else gives)
        return build

    return register


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Modules built inside have the same values every time; what a class leaves as it finds it in memory is NaN."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        torch.use_deterministic_algorithms(True, warn_only=True)  # it fills what torch.empty gives
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def randomise(pipe: Any, seed: int) -> None:
    """Give every parameter of every component a seeded random value: see `randomise_module`."""
    for name, component in sorted(pipe.components.items()):
        if isinstance(component, torch.nn.Module):
            randomise_module(component, torch.Generator().manual_seed(seed ^ zlib.crc32(name.encode())))


@torch.no_grad()
def randomise_module(module: torch.nn.Module, generator: torch.Generator) -> None:
    """Give every parameter a random value, so that none is zero or passes nothing on.

    Matrices, kernels and tables are drawn with a variance of one over their fan-in. Vectors (norms, biases, gates)
    keep the value that they were constructed with (zero where that is none), and are disturbed: AdaLN-zero gates open,
    norms stay near one.
    """
    module.eval().requires_grad_(False)
    for parameter in module.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        fan_in = math.prod(parameter.shape[1:])
        if fan_in > 1:
            parameter.copy_(noise / fan_in**0.5)
        else:
            parameter.nan_to_num_().add_(noise, alpha=0.1)
