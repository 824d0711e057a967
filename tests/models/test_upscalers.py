"""Files of upscalers are known by their tensors, give what their networks give, and are refused when they are not."""

from __future__ import annotations

from importlib.metadata import EntryPoint

import pytest
import torch
from safetensors.torch import save_file

from diffkiln import plugins
from diffkiln.errors import SourceError
from diffkiln.models.adding import open_added
from diffkiln.models.upscalers import filled
from diffkiln.models.upscalers.rrdbnet import PLUGIN as RRDBNETS
from diffkiln.models.upscalers.rrdbnet import RRDBNet
from diffkiln.models.upscalers.srvgg import PLUGIN as COMPACT
from diffkiln.spec.model import ComponentSource
from tests.models.enhancers import rrdbnet, srvgg

#: What ESRGAN's own files call the tensors of a network with two blocks.
OLD = {"conv_first": "model.0", "conv_body": "model.1.sub.2", "conv_up1": "model.3", "conv_up2": "model.6"}
OLD |= {"conv_hr": "model.8", "conv_last": "model.10"}


def opened(file):
    return open_added("enhancer", ComponentSource(single_file=file.name), file.parent).component


def drawn(module, side=(6, 7)):
    with torch.inference_mode():
        return module(torch.rand(2, 3, *side, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize(("unit", "scale"), [(1, 4), (2, 2), (4, 1)])
def test_a_network_of_dense_blocks_comes_from_its_file(unit, scale, tmp_path):
    original = rrdbnet(tmp_path / "x.safetensors", unit, prefix="params_ema.")
    component = opened(tmp_path / "x.safetensors")
    assert component.kind is RRDBNet
    assert all(tensor.is_meta for tensor in component.build(False).parameters())
    made = drawn(component.build(True))
    assert torch.equal(made, drawn(original))
    assert made.shape == (2, 3, 6 * scale, 7 * scale)


def test_esrgans_own_names_are_the_same_network(tmp_path):
    original = rrdbnet(tmp_path / "new.safetensors", unit=1)
    tensors = {}
    for name, tensor in original.state_dict().items():
        layer, _, leaf = name.rpartition(".")
        block = layer.replace("body.", "model.1.sub.").replace("rdb", "RDB") + ".0"
        tensors[f"{OLD.get(layer, block)}.{leaf}"] = tensor.clone()
    save_file(tensors, tmp_path / "old.safetensors")
    assert torch.equal(drawn(opened(tmp_path / "old.safetensors").build(True)), drawn(original))


@pytest.mark.parametrize("scale", [1, 2, 3, 4])
def test_a_compact_network_comes_from_its_file(scale, tmp_path):
    original = srvgg(tmp_path / "x.safetensors", scale)
    made = drawn(opened(tmp_path / "x.safetensors").build(True))
    assert torch.equal(made, drawn(original))
    assert made.shape[-2:] == (6 * scale, 7 * scale)


def test_each_knows_its_own_files_only(tmp_path):
    shapes = [
        {name: tuple(tensor.shape) for name, tensor in make(tmp_path / "x.safetensors").state_dict().items()}
        for make in (rrdbnet, srvgg)
    ]
    assert [RRDBNETS.fits(each) for each in shapes] == [True, False]
    assert [COMPACT.fits(each) for each in shapes] == [False, True]
    assert not any(plugin.fits(other) for plugin in (RRDBNETS, COMPACT) for other in ({}, {"body.0.weight": (8, 4)}))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda tensors: {"layer.weight": torch.zeros(3)}, "those of no upscaler that is known (layer.weight, …)"),
        (lambda tensors: {k: t for k, t in tensors.items() if k != "conv_hr.bias"}, "does not hold a whole upscaler"),
        (lambda tensors: tensors | {"conv_hr.bias": torch.zeros(3)}, "does not hold a whole upscaler"),
    ],
)
def test_other_files_are_refused(change, reason, tmp_path):
    save_file(change(dict(rrdbnet(tmp_path / "x.safetensors").state_dict())), tmp_path / "x.safetensors")
    with pytest.raises(SourceError) as found:
        opened(tmp_path / "x.safetensors")
    (problem,) = found.value.problems
    assert reason in problem.reason
    assert problem.where == ".file"


class Twice:
    """An upscaler of another distribution: one number, by which everything is multiplied."""

    def fits(self, shapes):
        return shapes.keys() == {"factor"}

    def made(self, tensors):
        return filled(_Factor, tensors)


class _Factor(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.factor = torch.nn.Parameter(torch.ones(1))

    def forward(self, pictures):
        return pictures * self.factor


PLUGIN = Twice()


def test_another_distribution_brings_an_architecture(tmp_path, monkeypatch):
    entry = EntryPoint("twice", f"{__name__}:PLUGIN", "diffkiln.upscalers")
    monkeypatch.setattr(plugins, "entry_points", lambda group: [entry] if group == entry.group else [])
    plugins.plugins.cache_clear()
    try:
        save_file({"factor": torch.tensor([0.5])}, tmp_path / "x.safetensors")
        component = opened(tmp_path / "x.safetensors")
    finally:
        plugins.plugins.cache_clear()
    assert component.kind is _Factor
    assert torch.equal(component.build(True)(torch.ones(1, 3, 2, 2)), torch.full((1, 3, 2, 2), 0.5))
