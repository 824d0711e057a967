"""What claims the same bits does so wherever tensors lie in memory."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from itertools import cycle

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from diffkiln.compiler.modules import record_module
from diffkiln.compiler.verify.components import replay
from diffkiln.models.meta import replace_weights
from diffkiln.models.weights import weights_of
from diffkiln.record.constants import Constants

#: In elements; those of a module's weights in turn.
OFFSETS = st.lists(st.integers(0, 31), min_size=1, max_size=8)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.to_q, self.to_k = nn.LayerNorm(64), nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
        x = self.norm(x) * (1 + self.to_q(row))
        return nn.functional.scaled_dot_product_attention(x, self.to_k(x), x) + x


class Model(nn.Module):
    """A product of one row, which is where MKL looks at where a matrix lies; attention, a convolution, and a table."""

    _repeated_blocks = ("Block",)

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.embed, self.conv = nn.Linear(64, 64), nn.Conv1d(7, 7, 3, padding=1)

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        frequencies = torch.exp(-9.0 * torch.arange(32, dtype=torch.float32) / 32)
        row = self.embed(torch.cat([torch.sin(time * frequencies), torch.cos(frequencies)[None]], -1))
        for block in self.blocks:
            x = block(x, row)
        return self.conv(x)


def moved(tensor: torch.Tensor, offset: int) -> torch.Tensor:
    """A copy that begins `offset` elements behind where memory was given."""
    room = torch.empty(tensor.numel() + offset, dtype=tensor.dtype)
    return room[offset:].view(tensor.shape).copy_(tensor)


def placed(module: nn.Module, offsets: list[int]) -> None:
    """Moves every weight of a module, in turn by each of the offsets."""
    turn = cycle(offsets)
    replace_weights(module, lambda _, tensor: moved(tensor.detach(), next(turn)))


def example() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Model().eval().requires_grad_(False), {"x": torch.randn(1, 7, 64), "time": torch.randn(1, 1)}


def verified(module: nn.Module, given: dict[str, torch.Tensor]) -> Callable[..., list[torch.Tensor]]:
    """A module's program as a function of weights and inputs, after it was compared with the module to the bit."""
    constants = Constants()
    callee, program = record_module(module, given, (), constants)
    return lambda weights, inputs: replay(program, program.programs[callee.program], weights, constants.tensors)(inputs)


def verify_anywhere(module: nn.Module, given: dict[str, torch.Tensor], offsets: list[int]) -> None:
    placed(module, offsets)
    verified(module, {name: moved(tensor, offsets[0]) for name, tensor in given.items()})


@settings(max_examples=20, deadline=None)
@given(offsets=OFFSETS)
def test_recording_is_verified_wherever_weights_and_inputs_lie(offsets):
    verify_anywhere(*example(), offsets)


@settings(max_examples=20, deadline=None)
@given(offsets=OFFSETS)
def test_weights_elsewhere_give_the_same_bits_in_the_arithmetic_of_tests(offsets):
    module, given_ = example()
    run = verified(module, given_)
    weights, inputs = dict(weights_of(module)), list(given_.values())
    elsewhere = {name: moved(weights[name], offset) for name, offset in zip(weights, cycle(offsets), strict=False)}
    (want,), (got,) = run(weights, inputs), run(elsewhere, [moved(tensor, offsets[-1]) for tensor in inputs])
    assert torch.equal(want, got)


def test_recording_is_verified_wherever_weights_lie_in_the_arithmetic_of_users():
    """In a process where MKL may look at where a matrix lies, which it reads from the environment when first called."""
    code = f"""
import os, random, tests
del os.environ["MKL_CBWR"]
from {__name__} import example, verify_anywhere
for seed in range(20):
    verify_anywhere(*example(), random.Random(seed).choices(range(32), k=5))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
