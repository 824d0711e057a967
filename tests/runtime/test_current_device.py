"""A GPU is the current one while a bundle is loaded on it and runs, and one that is not there is said not to be."""

from __future__ import annotations

import pytest
import torch

import diffkiln
from diffkiln.errors import Incompatible
from diffkiln.runtime.current_device import current


def test_a_gpu_that_is_not_there_is_told_how_many_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(Incompatible, match="found 1 that torch can use, numbered from 0, required cuda:1"):
        current(torch.device("cuda:1"))


def test_it_is_the_current_one_while_a_bundle_is_loaded_and_runs(
    digits_bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered: list[str] = []

    def seen(place: torch.device):
        entered.append(str(place))
        return current(place)

    for module in ("loading", "executor"):
        monkeypatch.setattr(f"diffkiln.runtime.{module}.current", seen)
    with diffkiln.load(digits_bundle, device="cpu") as pipe:
        assert entered == ["cpu"]
        pipe("seven")
    assert entered == ["cpu", "cpu"]
