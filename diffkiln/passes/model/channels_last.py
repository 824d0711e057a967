"""Lay out convolutions' weights with their channels last."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import ClassVar

import torch

from diffkiln.errors import Problem
from diffkiln.interpreter.layers import to_channels_last
from diffkiln.passes.base import Fact, ModelPass, State
from diffkiln.spec import Target


class ChannelsLast(ModelPass):
    """Lay out the weights of 2D convolutions with their channels last, which GPUs and CPUs convolve faster.

    The bundle's files hold them in that order. Convolutions inside repeated blocks stay as they are: a compiler chooses
    the layout there.
    """

    name: ClassVar[str] = "channels_last"
    summary: ClassVar[str] = "store the weights of 2D convolutions with channels last"
    examples: ClassVar = ({"name": "channels_last", "component": "unet"},)

    def provides(self) -> Iterable[Fact]:
        return [Fact("channels_last", self.component, self.name)]

    def check_module(self, module: torch.nn.Module, state: State, target: Target, where: str) -> Iterable[Problem]:
        if not to_channels_last(module, try_only=True):
            yield Problem(
                where, f"{type(module).__name__} has no 2D convolution outside of its repeated blocks", "Remove it."
            )

    def apply(self, module: torch.nn.Module) -> Sequence[str]:
        names = to_channels_last(module)
        return [f"{len(names)} convolutions with channels last"] if names else []


PLUGIN = ChannelsLast
