"""Blocks that compute the same are found out once; the number of a layer counts where it is read."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from diffkiln.record.structural_key import OncePerStructure, structural_key


class Layer(torch.nn.Module):
    """Numbered as transformers numbers its layers; reads the number where it has a cache."""

    def __init__(self, index: int, factor: float = 1.0) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(2, 2, device="meta")
        self.layer_idx = index
        self.factor = factor

    def forward(self, cached: bool) -> Any:
        return self.layer_idx if cached else self.factor


class Outer(torch.nn.Module):
    def __init__(self, index: int) -> None:
        super().__init__()
        self.inner = Layer(index)

    def forward(self, cached: bool) -> Any:
        return self.inner(cached)


def given(blocks: list[torch.nn.Module], cached: bool) -> tuple[list[Any], int]:
    """What each block gives, and how many were run."""
    once: OncePerStructure[Any] = OncePerStructure(blocks)
    runs: list[torch.nn.Module] = []

    def run(block: torch.nn.Module) -> Any:
        runs.append(block)
        return block(cached)

    return [once.get(block, cached, lambda block=block: run(block)) for block in (*blocks, *blocks)], len(runs)


@pytest.mark.parametrize("kind", [Layer, Outer])
def test_a_number_that_is_not_read_makes_no_difference(kind: type[torch.nn.Module]) -> None:
    assert given([kind(0), kind(1), kind(2)], cached=False) == ([1.0] * 6, 1)


@pytest.mark.parametrize("kind", [Layer, Outer])
def test_a_number_that_is_read_does(kind: type[torch.nn.Module]) -> None:
    assert given([kind(0), kind(1), kind(1)], cached=True) == ([0, 1, 1] * 2, 2)


def test_another_attribute_does() -> None:
    assert given([Layer(0), Layer(1, factor=2.0)], cached=False) == ([1.0, 2.0] * 2, 2)


def test_other_arguments_do() -> None:
    block = Layer(3)
    once: OncePerStructure[Any] = OncePerStructure([block])
    assert [once.get(block, cached, lambda cached=cached: block(cached)) for cached in (False, True)] == [1.0, 3]


def test_the_layer_keeps_its_number_and_may_change_it_meanwhile() -> None:
    block = Layer(3)
    once: OncePerStructure[Any] = OncePerStructure([block])
    once.get(block, "", lambda: setattr(block, "layer_idx", 4))
    assert block.layer_idx == 4
    assert not hasattr(Layer, "layer_idx")


def test_weights_of_other_shapes_or_types_are_not_alike() -> None:
    assert structural_key(Layer(0)) == structural_key(Layer(1))
    assert structural_key(Layer(0)) != structural_key(Layer(0).half())
