"""Does this machine fit? Every difference, found against required, before any native code is loaded."""

from __future__ import annotations

from importlib import metadata

import pytest

from diffkiln.bundle import Requires
from diffkiln.errors import Incompatible, MissingDependency
from diffkiln.runtime import compatibility
from diffkiln.runtime.compatibility import ISA_FLAGS, check_target, missing_flags

V2 = ISA_FLAGS["x86-64-v2"]
V3 = V2 | ISA_FLAGS["x86-64-v3"]


@pytest.fixture
def machine(monkeypatch):
    """A Linux machine with AVX2, glibc 2.34, and torch 2.13."""
    monkeypatch.setattr(compatibility, "_cpu_flags", lambda: V3)
    monkeypatch.setattr(compatibility, "_glibc", lambda: "2.34")
    monkeypatch.setattr(compatibility.torch, "__version__", "2.13.0+cpu")
    monkeypatch.setattr(compatibility.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(compatibility.sys, "platform", "linux")
    return monkeypatch


def requires(**changed):
    return Requires(**{"python": ">=3.11", "torch": "==2.13.*", "glibc": "2.34"} | changed)


def test_the_right_machine_passes(machine):
    check_target(requires(), "x86-64-v3", native=True)


@pytest.mark.parametrize(
    ("changed", "isa", "message"),
    [
        ({"python": ">=3.99"}, None, r"python: found .*, required >=3\.99"),
        ({"torch": "==2.12.*"}, None, r"torch: found 2\.13\.0, required ==2\.12\.\*"),
        ({"torch": ">=2.14,<2.16"}, None, r"torch: found 2\.13\.0"),
        ({"os": "win32"}, None, "os: found linux, required win32"),
        ({"machine": "aarch64"}, None, "machine: found x86_64, required aarch64"),
        ({"glibc": "2.39"}, None, r"glibc: found 2\.34, required 2\.39 or later"),
        ({}, "x86-64-v4", "cpu_isa: found a CPU without avx512.*, required x86-64-v4"),
        ({"sm": "sm_90"}, None, "gpu: found no CUDA GPU, required sm_90"),
        ({"packages": {"no-such-package": ">=1"}}, None, "no-such-package: found nothing.*pip install no-such-package"),
        ({"packages": {"numpy": ">=99"}}, None, "numpy: found .*, required >=99"),
        ({"torch": "~=2.13"}, None, "cannot read"),
        ({"cuda": "12.8"}, None, r"cuda: found a torch built for 13\.0, required 12\.8"),
        ({"driver": "580.65.06"}, None, r"driver: found 570\.26, required 580\.65\.06 or later.*Update"),
    ],
)
def test_each_difference_is_found_against_required(machine, changed, isa, message):
    machine.setattr(compatibility, "_sm", lambda: None)
    machine.setattr(compatibility.torch.version, "cuda", "13.0")
    machine.setattr(compatibility, "_driver", lambda: "570.26")
    with pytest.raises(Incompatible, match=message):
        check_target(requires(**changed), isa, native=True)


@pytest.mark.parametrize("distribution", ["onnxruntime", "onnxruntime-gpu"])
def test_any_distribution_of_a_module_will_do(machine, distribution):
    def version(name):
        if name != distribution:
            raise metadata.PackageNotFoundError(name)
        return "1.31.1"

    machine.setattr(compatibility.metadata, "version", version)
    check_target(requires(packages={"onnxruntime": ">=1.31"}), None, native=False)
    with pytest.raises(
        MissingDependency, match=r"onnxruntime: found 1\.31\.1, required >=1\.32.*pip install onnxruntime"
    ):
        check_target(requires(packages={"onnxruntime": ">=1.32"}), None, native=False)


def test_differences_come_together(machine):
    with pytest.raises(Incompatible) as caught:
        check_target(requires(torch="==2.12.*", glibc="2.40"), "x86-64-v4", native=True)
    assert [problem.where for problem in caught.value.problems] == ["torch", "cpu_isa", "glibc"]


def test_another_minor_version_of_cuda_and_a_later_driver_fit(machine):
    machine.setattr(compatibility.torch.version, "cuda", "13.2")
    machine.setattr(compatibility, "_driver", lambda: "590.12")
    check_target(requires(cuda="13.0", driver="580.65.06"), None, native=True)


def test_a_torch_without_cuda_does_not_fit_engines_for_gpus(machine):
    machine.setattr(compatibility.torch.version, "cuda", None)
    with pytest.raises(Incompatible, match=r"cuda: found a torch built without CUDA, required 13\.0"):
        check_target(requires(cuda="13.0"), None, native=True)


def test_without_native_code_torch_and_cpu_do_not_matter(machine):
    check_target(requires(torch="==2.12.*", glibc="2.99"), "x86-64-v4", native=False)


def test_levels_include_those_below():
    assert missing_flags("x86-64-v9")[-1] == "unknown level x86-64-v9"


def test_a_cpu_without_avx2_fits_v2_only(monkeypatch):
    monkeypatch.setattr(compatibility, "_cpu_flags", lambda: V2)
    assert missing_flags("x86-64-v2") == []
    assert "avx2" in missing_flags("x86-64-v3")


def test_flags_are_those_that_the_spec_knows():
    """The table stands in two places, since the runtime may not import the spec."""
    from diffkiln.spec.targets import CPU_FLAGS

    for level, flags in ISA_FLAGS.items():
        assert flags <= set(CPU_FLAGS[level])
