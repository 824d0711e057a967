"""Parts of a component that a call switches on and off."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from diffkiln.models.meta import make_fake
from diffkiln.record.components import Callee, record_component
from diffkiln.record.constants import Constants
from diffkiln.record.settings import Switches, with_settings
from diffkiln.record.structure import flatten

OFF = (("blocks.0.gate", "enabled", False), ("blocks.1.gate", "enabled", False))


class Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enabled = True
        self.calls = 0

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return hidden_states.relu() if self.enabled else hidden_states


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = Gate()

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.gate(hidden_states) + 1


class Net(nn.Module):
    _repeated_blocks = ("Block",)

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            hidden_states = block(hidden_states)
        return hidden_states


@pytest.fixture
def net():
    return Net()


def switched_off(net):
    for block in net.blocks:
        block.gate.enabled = False


def test_what_a_call_sets_is_noticed_and_taken_back(net):
    switches = Switches(SimpleNamespace(components={"unet": net, "vae": Net(), "scheduler": object()}))
    with switches.watched():
        assert switches.of("unet") == ()
        switched_off(net)
        assert (switches.of("unet"), switches.of("vae")) == (OFF, ())
        net.blocks[1].gate.enabled = True
        assert switches.of("unet") == OFF[:1]
    assert net.blocks[0].gate.enabled
    switched_off(net)
    with switches.watched():
        assert switches.of("unet") == ()


def test_what_a_component_sets_itself_is_no_setting(net):
    switches = Switches(SimpleNamespace(components={"unet": net}))
    with switches.watched(), switches.itself():
        net(torch.zeros(2))
        assert switches.of("unet") == ()
    assert net.blocks[0].gate.calls == 1


def test_settings_last_as_long_as_the_block_and_skip_what_is_not_there(net):
    with with_settings(net, (*OFF, ("blocks.7", "enabled", False))):
        assert not net.blocks[1].gate.enabled
    assert net.blocks[0].gate.enabled


def test_each_setting_has_a_program_and_regions_of_its_own(net):
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    make_fake(net, fake)
    with fake:
        leaves, structure = flatten(((torch.zeros(2),), {}))
    way = Callee("unet", "forward", net, net.forward, leaves, structure, ([], None))
    ways = [way, replace(way, settings=OFF)]
    assert ways[0].key != ways[1].key
    recorded = record_component(ways[::-1], fake, Constants())
    assert [way.program for way in ways] == list(recorded.programs) == ["unet", "unet-2"]
    regions = [{op.attrs["region"] for op in recorded.programs[way.program].ops} for way in ways]
    assert [len(names) for names in regions] == [1, 1]
    on, off = ([op.name for op in recorded.regions[names.pop()].ops] for names in regions)
    assert (on, off) == (["aten.relu.default", "aten.add.Tensor"], ["aten.add.Tensor"])
