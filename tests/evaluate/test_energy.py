"""Energy as the drivers tell it. The counters here are files and a module that stand for the kernel's and NVML's."""

from __future__ import annotations

import sys
import types

import pytest
import torch

from diffkiln.evaluate import energy
from diffkiln.evaluate.energy import Meter

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")
RANGE = 262_143_328_850


def zone(folder, name, kind, microjoules):
    made = folder / name
    made.mkdir(exist_ok=True)
    (made / "name").write_text(f"{kind}\n")
    (made / "energy_uj").write_text(f"{microjoules}\n")
    (made / "max_energy_range_uj").write_text(f"{RANGE}\n")


def test_the_packages_are_added_up_and_their_parts_are_not(tmp_path):
    for name, kind in (("intel-rapl:0", "package-0"), ("intel-rapl:1", "package-1"), ("intel-rapl:0:0", "core")):
        zone(tmp_path, name, kind, 5_000_000)
    zone(tmp_path, "intel-rapl:2", "psys", 5_000_000)
    meter = Meter(CPU, tmp_path)
    for name, kind in (("intel-rapl:0", "package-0"), ("intel-rapl:1", "package-1"), ("intel-rapl:0:0", "core")):
        zone(tmp_path, name, kind, 7_500_000)
    assert meter.joules() == {"cpu": 5.0}


def test_a_counter_that_began_again_is_followed(tmp_path):
    zone(tmp_path, "intel-rapl:0", "package-0", RANGE - 1_000_000)
    meter = Meter(CPU, tmp_path)
    zone(tmp_path, "intel-rapl:0", "package-0", 2_000_000)
    assert meter.joules() == {"cpu": pytest.approx(3.0)}


@pytest.mark.parametrize("missing", ["energy_uj", "max_energy_range_uj"])
def test_a_counter_that_cannot_be_read_tells_nothing(tmp_path, missing):
    zone(tmp_path, "intel-rapl:0", "package-0", 1)
    (tmp_path / "intel-rapl:0" / missing).unlink()
    assert Meter(CPU, tmp_path).joules() == {}


def test_a_machine_without_counters_tells_nothing(tmp_path):
    assert Meter(CPU, tmp_path / "nowhere").joules() == {}


class NVMLError(Exception):
    pass


def nvml(monkeypatch, readings):
    """A module in place of pynvml; the readings are millijoules, or an error."""
    left = iter(readings)

    def reading(handle):
        found = next(left)
        if isinstance(found, Exception):
            raise found
        return found

    module = types.ModuleType("pynvml")
    module.NVMLError, module.nvmlInit = NVMLError, lambda: None
    module.nvmlDeviceGetHandleByUUID = lambda uuid: uuid
    module.nvmlDeviceGetTotalEnergyConsumption = reading
    monkeypatch.setitem(sys.modules, "pynvml", module)
    monkeypatch.setattr(energy, "uuid_of", lambda device: "GPU-1")


def test_a_gpu_is_counted_in_millijoules(tmp_path, monkeypatch):
    nvml(monkeypatch, [0, 0, 1_000, 43_000])  # whether there is a counter, the first start, the second, the end
    meter = Meter(GPU, tmp_path)
    meter.start()
    assert meter.joules() == {"gpu": 42.0}


def test_a_gpu_without_a_counter_tells_nothing(tmp_path, monkeypatch):
    nvml(monkeypatch, [NVMLError("not supported")])
    assert Meter(GPU, tmp_path).joules() == {}


def test_without_the_package_nothing_is_told(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert Meter(GPU, tmp_path).joules() == {}
