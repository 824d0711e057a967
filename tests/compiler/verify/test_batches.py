"""rows: a component whose rows touch each other is told."""

from __future__ import annotations

import pytest
import torch

from diffkiln.compiler.verify.batches import _compare
from diffkiln.errors import VerifyError
from diffkiln.record.components import Callee
from diffkiln.record.structure import flatten


class Net(torch.nn.Module):
    def __init__(self, mixes: bool) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(3), requires_grad=False)
        self.mixes = mixes

    def forward(self, x):
        return (x - x.mean(0, keepdim=True) if self.mixes else x) * self.scale


def called(net, x):
    leaves, structure = flatten(((x,), {}))
    return Callee("net", "forward", net, net.forward, leaves, structure, ([], None)), leaves


@pytest.mark.parametrize("mixes", [False, True])
def test_rows_that_depend_on_each_other_are_told(mixes):
    net, whole = Net(mixes), torch.arange(6.0).reshape(2, 3)
    given = called(net, whole), [called(net, half) for half in whole.chunk(2)], "net.halved"
    if not mixes:
        _compare(net, *given)
        return
    with pytest.raises(VerifyError, match="what a row gives depends on the other rows"):
        _compare(net, *given)
