"""Which engines a load tries."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from diffkiln.bundle import open_bundle
from diffkiln.program import Input, Module, Op, Program, Ref, TensorType
from diffkiln.runtime.trials import LARGEST, Trials, chosen, elements

SIZES = {"Block": 64, "Block-2": 8, "Block-3": 512, "between": 16, "between-2": 4, "whole": LARGEST}


def region(name: str, size: int) -> Program:
    kind = TensorType("float32", (size,))
    ops = (Op("aten.mul.Tensor", (Ref("%x"), Ref("@w")), ("%1",)),)
    return Program(name, (Input("%x", kind),), ops, (Ref("%1"),), dict.fromkeys(("%x", "@w", "%1"), kind))


@pytest.fixture
def modules():
    regions = {name: region(name, size) for name, size in SIZES.items()}
    return {"unet": Module("unet", {}, regions), "vae": Module("vae", {}, regions)}


def row(component, name, backend="aot_inductor"):
    return SimpleNamespace(component=component, region=name, backend=backend, path=f"engines/{component}/{name}")


def test_the_smallest_engine_of_each_kind_stands_for_it(modules):
    rows = [row("unet", name) for name in SIZES if name != "whole"]
    assert chosen(rows, modules) == {"engines/unet/Block-2", "engines/unet/between-2"}


def test_components_and_backends_are_kinds_of_their_own(modules):
    rows = [row("unet", "Block"), row("vae", "Block"), row("unet", "Block-3", "onnx")]
    assert chosen(rows, modules) == {item.path for item in rows}


def test_no_engine_is_tried_that_takes_longer_than_a_load(modules, caplog):
    with caplog.at_level("INFO"):
        assert chosen([row("vae", "whole")], modules) == set()
    assert "vae/whole: not tried at this load" in caplog.text
    assert elements(modules["vae"].regions["whole"]) > LARGEST


@pytest.fixture
def verified(digits_bundle, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    with open_bundle(digits_bundle) as bundle, bundle.verify() as held:
        yield held


def test_a_receipt_spares_a_trial_unless_one_is_asked_for(verified, modules):
    def trials(wanted=None):
        return Trials(verified, [row("unet", "Block")], modules, torch.device("cpu"), wanted)

    path = "engines/unet/Block"
    assert trials().wants(path)
    assert not trials(False).wants(path)
    trials().passed(path)
    assert not trials().wants(path)
    assert trials(True).wants(path)
    assert trials(True).wants("engines/vae/whole")
