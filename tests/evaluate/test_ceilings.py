"""What devices can do at most: of GPUs by name, of this CPU as measured."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from diffkiln.evaluate import ceilings
from diffkiln.evaluate.ceilings import ceilings_here, ceilings_of
from diffkiln.program.work import Ceilings
from diffkiln.runtime import accelerator
from diffkiln.spec import GPUS, TARGETS


def test_a_named_gpu_has_its_data_sheets_numbers() -> None:
    assert ceilings_of(GPUS["nvidia-l4"]) == Ceilings({16: 121e12}, 300e9, GPUS["nvidia-l4"].h2d_bandwidth)


def test_of_a_gpu_whose_arithmetic_is_not_known_the_rest_is() -> None:
    assert ceilings_of(GPUS["nvidia-rtx-4070"]).flops == {}
    assert ceilings_of(GPUS["nvidia-rtx-4070"]).known


def test_a_cpu_that_is_not_here_has_none() -> None:
    assert not ceilings_of(TARGETS["cpu-x86-64-v3"]).known


def test_the_gpu_that_is_here_is_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerator, "model", lambda _: "NVIDIA L4 sm_89")
    assert ceilings_here(torch.device("cuda")) == ceilings_of(GPUS["nvidia-l4"])
    monkeypatch.setattr(accelerator, "model", lambda _: "NVIDIA Unheard sm_89")
    assert not ceilings_here(torch.device("cuda")).known


def test_this_cpu_is_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(ceilings, "_SIDE", 64)
    monkeypatch.setattr(ceilings, "_COPIED", 4096)
    (tmp_path / "file").write_bytes(bytes(4096))
    found = ceilings_here(torch.device("cpu"), str(tmp_path / "file"))
    assert (set(found.flops), found.known) == ({32}, True)
    assert min(found.flops[32], found.memory or 0, found.link or 0) > 0
    assert ceilings_here(torch.device("cpu")).link is None
