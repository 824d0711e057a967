"""What caching methods do, in plain PyTorch, on diffusers' own modules: slow, direct, and written without programs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from diffkiln.interpreter.layers import repeated_blocks


class Run:
    """Counts the calls of a denoiser: its steps, and the lanes of a step.

    Args:
        module: the denoiser.
        mask: which steps compute.
        lanes: calls in one step, such as two for guidance.
    """

    def __init__(self, module: torch.nn.Module, mask: Sequence[bool], lanes: int = 1) -> None:
        self.module, self.mask, self.call_sites = module, mask, lanes
        self.calls = 0

    @property
    def step(self) -> int:
        return self.calls // self.call_sites

    @property
    def branch(self) -> int:
        return self.calls % self.call_sites

    @property
    def computes(self) -> bool:
        return self.mask[self.step]


@contextmanager
def _counted(run: Run, forward: Callable[..., Any]) -> Iterator[None]:
    def counting(*args: Any, **kwargs: Any) -> Any:
        result = forward(*args, **kwargs)
        run.calls += 1
        return result

    run.module.forward = counting
    try:
        yield
    finally:
        del run.module.forward


@contextmanager
def output(run: Run, order: int = 0) -> Iterator[None]:
    """A step that reuses gives the last output, or the Taylor polynomial through the last ones."""
    original = run.module.forward
    factors: dict[int, list[torch.Tensor]] = {}
    updated: dict[int, int] = {}

    def forward(*args: Any, **kwargs: Any) -> Any:
        if run.computes:
            result = original(*args, **kwargs)
            value = result[0] if isinstance(result, tuple) else result.sample
            new = [value]
            if run.branch in factors:
                gap = run.step - updated[run.branch]
                for level in range(min(order, len(factors[run.branch]))):
                    new.append((new[level] - factors[run.branch][level]) / gap)
            factors[run.branch], updated[run.branch] = new, run.step
            return result
        total, factorial = torch.zeros_like(factors[run.branch][0]), 1
        for level, factor in enumerate(factors[run.branch]):
            factorial *= max(level, 1)
            total = total + factor * (run.step - updated[run.branch]) ** level / factorial
        return (total,)

    with _counted(run, forward):
        yield


@contextmanager
def blocks(run: Run, front: int = 0, back: int = 0) -> Iterator[None]:
    """In a step that reuses, each block between those in front and in back gives its input and what it last added."""
    added: dict[Any, list[torch.Tensor]] = defaultdict(list)
    drops_text: dict[int, bool] = {}
    every = [block for _, block in repeated_blocks(run.module)]

    def cached(block: torch.nn.Module, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            key = id(block), run.branch
            if not run.computes:
                streams = _streams(block, args, kwargs, len(added[key]))
                given = [stream + more for stream, more in zip(streams, added[key], strict=True)]
                return tuple(given) if len(given) > 1 else (None, *given) if drops_text[id(block)] else given[0]
            result = original(*args, **kwargs)
            drops_text[id(block)] = isinstance(result, tuple) and result[0] is None
            values = [value for value in (result if isinstance(result, tuple) else (result,)) if value is not None]
            streams = _streams(block, args, kwargs, len(values))
            added[key] = [value - stream for value, stream in zip(values, streams, strict=True)]
            return result

        return forward

    between = every[front : len(every) - back]
    for block in between:
        block.forward = cached(block, block.forward)
    try:
        with _counted(run, run.module.forward):
            yield
    finally:
        for block in between:
            del block.forward


def _streams(block: Any, args: Any, kwargs: Any, count: int) -> list[torch.Tensor]:
    """What comes into a block, in the order of what it gives: Flux and SD3 give the text first."""
    hidden = kwargs.get("hidden_states", args[0] if args else None)
    if count == 1:
        return [hidden]
    text = kwargs.get("encoder_hidden_states", args[1] if len(args) > 1 else None)
    return [hidden, text] if "CogVideoX" in type(block).__name__ else [text, hidden]


@contextmanager
def deep(run: Run, depth: int) -> Iterator[None]:
    """In a step that reuses, the residual block `depth` from the end of the way up takes what last came from below."""
    resnets = [resnet for block in run.module.up_blocks for resnet in block.resnets]  # type: ignore[union-attr]
    skips = [resnet for block in run.module.down_blocks for resnet in block.resnets]  # type: ignore[union-attr]
    assert depth <= len(skips)
    kept: dict[int, torch.Tensor] = {}

    def swap(module: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        joined = args[0]
        channels = _deep_channels(run.module, resnets.index(module), joined.shape[1])
        if run.computes:
            kept[run.branch] = joined[:, :channels]
            return args
        return torch.cat((kept[run.branch], joined[:, channels:]), dim=1), *args[1:]

    handle = resnets[-depth].register_forward_pre_hook(swap)
    try:
        with _counted(run, run.module.forward):
            yield
    finally:
        handle.remove()


def _deep_channels(module: Any, index: int, total: int) -> int:
    """How many of the joined channels come from below: the rest are the skip connection's."""
    widths = [module.conv_in.out_channels]
    for block in module.down_blocks:
        widths += [resnet.out_channels for resnet in block.resnets]
        if block.downsamplers:
            widths.append(block.downsamplers[0].out_channels)
    return total - widths[-1 - index]
