"""Modules that a pipeline gives from one of its components to another."""

import torch
from torch import nn

from diffkiln.models.borrowing import borrow, borrowed, shares


class Lender(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedder, self.own, self.scale = nn.Linear(2, 3), nn.Linear(3, 3), 1000.0
        self.token = nn.Parameter(torch.zeros(3))


class Net(nn.Module):
    """As Z-Image's control net, which has nothing in the place of its transformer's embedders."""

    def __init__(self):
        super().__init__()
        self.own, self.embedder, self.token, self.scale = nn.Linear(3, 3), None, None, None


def given_by(lender):
    net = Net()
    net.embedder, net.token, net.scale = lender.embedder, lender.token, lender.scale
    return net


def test_a_component_gets_the_lender_s_modules_parameters_and_numbers():
    lender, loaded, alone = Lender(), Lender(), Net()
    whole = given_by(lender)
    # Each component's parameters are replaced for itself, so that only modules stay the same.
    whole.token = nn.Parameter(torch.ones(3))
    assert borrowed(alone, whole, lender) == {"embedder": "embedder", "token": "token", "scale": "scale"}
    borrow(alone, whole, loaded, lender)
    assert (alone.embedder, alone.token, alone.scale) == (loaded.embedder, loaded.token, 1000.0)
    assert alone.own is not loaded.own


def test_the_lender_borrows_nothing():
    lender = Lender()
    assert borrowed(Lender(), lender, given_by(lender)) == {}


def test_components_that_share_no_module_borrow_nothing():
    assert not shares(Net(), Lender())
    assert borrowed(Net(), Net(), Lender()) == {}
