"""Repeated blocks, and taking some of them out."""

import pytest
import torch

from diffkiln.interpreter.layers import drop_blocks, droppable_blocks, matching, repeated_blocks
from tests.passes.plans import ghost


class Tower(torch.nn.Module):
    _repeated_blocks = ("Linear",)

    def __init__(self) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList(torch.nn.Linear(1, 1) for _ in range(4))
        self.head = torch.nn.Linear(1, 1)


def test_blocks_are_found_by_class_and_only_those_of_a_list_may_be_dropped():
    names = [name for name, _ in repeated_blocks(Tower())]
    assert names == ["blocks.0", "blocks.1", "blocks.2", "blocks.3", "head"]
    assert list(droppable_blocks(Tower())) == names[:-1]


def test_later_blocks_move_up():
    tower = Tower()
    kept = [tower.blocks[1], tower.blocks[3]]
    assert drop_blocks(tower, ["blocks.0", "*.2"]) == ["blocks.0", "blocks.2"]
    assert list(tower.blocks) == kept


def test_patterns_match_whole_names_in_their_order():
    assert matching(["a.1", "a.10", "b.1"], ["a.?", "b*"]) == ["a.1", "b.1"]


@pytest.mark.parametrize("family", ["flux", "sdxl", "wan"])
def test_blocks_are_the_outermost_of_a_real_model(family):
    module = ghost(family).modules["unet" if family == "sdxl" else "transformer"]
    names = [name for name, _ in repeated_blocks(module)]
    assert names
    assert not any(a != b and a.startswith(f"{b}.") for a in names for b in names)
