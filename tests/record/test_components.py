"""Components whose repeated blocks are kept as calls."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from diffkiln.compiler.modules import record_module
from diffkiln.errors import DataDependent
from diffkiln.record.constants import Constants


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, hidden_states: torch.Tensor, skipped: torch.Tensor) -> torch.Tensor:
        return hidden_states * 2 if skipped else self.inner(hidden_states)


class Net(nn.Module):
    _repeated_blocks = ("Block",)

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, hidden_states: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        perturbed = torch.zeros(2) if mask is None else mask
        for skipped, block in zip((torch.ones(()).bool(), torch.all(perturbed == 1)), self.blocks, strict=True):
            hidden_states = block(hidden_states, skipped)
        return hidden_states


def test_a_block_that_asks_a_constant_for_its_way_is_a_region() -> None:
    _, recorded = record_module(Net(), {"hidden_states": torch.randn(2, 4)}, (), Constants())
    ways = [[op.name for op in region.ops] for region in recorded.regions.values()]
    assert [len(region.inputs) for region in recorded.regions.values()] == [1, 1]
    assert ways[0] == ["aten.mul.Tensor"]
    assert "aten.mul.Tensor" not in ways[1]


def test_a_block_that_asks_an_input_for_its_way_is_refused() -> None:
    given = {"hidden_states": torch.randn(2, 4), "mask": torch.zeros(2)}
    with pytest.raises(DataDependent, match=r"region 'blocks\.1'"):
        record_module(Net(), given, (), Constants())
