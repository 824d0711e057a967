"""The choice of a target: exact first, then the best that fits, found against required for each that does not."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

import diffkiln
from diffkiln.bundle import Manifest, device_features, device_policy, open_bundle
from diffkiln.errors import Incompatible
from diffkiln.runtime import compatibility, targets
from diffkiln.runtime.compatibility import ISA_FLAGS
from diffkiln.runtime.targets import EXACT, PTX, SAME_MAJOR, choose, device_for, gpu_fit, own_level
from tests.bundle import making
from tests.runtime.test_loading import copy, rewritten  # noqa: F401  the fixture of a copied bundle

NAMES = ("cpu-x86-64-v3", "cpu-x86-64-v2", "cpu-x86-64-v4")
CPU = torch.device("cpu")


def flags_of(level: str) -> frozenset[str]:
    """The flags of a CPU of this level and no higher."""
    levels = list(ISA_FLAGS)
    return frozenset().union(*(ISA_FLAGS[name] for name in levels[: levels.index(level) + 1]))


@pytest.fixture
def three(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Manifest:
    """The manifest of a bundle for three levels of CPU."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr(torch, "__version__", "2.13.0+cpu")  # which that bundle is for
    making.make_for(tmp_path / "bundle", NAMES)
    with open_bundle(tmp_path / "bundle") as bundle:
        return bundle.manifest


@pytest.mark.parametrize("level", ISA_FLAGS)
def test_the_cpus_own_level_is_chosen(three: Manifest, monkeypatch: pytest.MonkeyPatch, level: str) -> None:
    monkeypatch.setattr(compatibility, "_cpu_flags", lambda: flags_of(level))
    choice = choose(three, CPU)
    assert own_level() == level
    assert choice.target == f"cpu-{level}"
    assert choice.why == f"its {level} is this CPU's own level"
    assert set(choice.others) == set(NAMES) - {choice.target}


def test_without_its_own_level_the_best_that_fits_is_chosen(three: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compatibility, "_cpu_flags", lambda: flags_of("x86-64-v4"))
    choice = choose(three, CPU, NAMES[:2])
    assert (choice.target, choice.why) == (NAMES[0], "x86-64-v3 is the highest here that this CPU has")
    assert choice.others[NAMES[1]] == "fits too, but not as well as cpu-x86-64-v3"
    assert "left out when the bundle was pulled" in choice.others[NAMES[2]]


def test_the_reasons_are_logged(
    three: Manifest, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(compatibility, "_cpu_flags", lambda: flags_of("x86-64-v3"))
    with caplog.at_level(logging.INFO, "diffkiln"):
        assert targets.choose_target(three, CPU) == NAMES[0]
    assert "target cpu-x86-64-v3: its x86-64-v3 is this CPU's own level" in caplog.text
    assert "not cpu-x86-64-v4: cpu_isa: found a CPU without avx512bw" in caplog.text


def test_a_machine_that_fits_none_is_told_found_against_required_for_each(
    three: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compatibility, "_cpu_flags", lambda: ISA_FLAGS["x86-64-v2"] - {"popcnt"})
    assert own_level() is None
    with pytest.raises(Incompatible, match="fits none of the bundle's targets") as caught:
        choose(three, CPU)
    for name in NAMES:
        _, _, after = str(caught.value).partition(f"target {name}:\n")
        line = after.splitlines()[0]
        assert "found a CPU without" in line
        assert "popcnt" in line
        assert f"required {name.removeprefix('cpu-')}" in line


def test_engines_for_another_torch_fit_nowhere(three: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compatibility.torch, "__version__", "2.99.0")
    with pytest.raises(Incompatible, match=r"torch: found 2\.99\.0, required ==2\.13"):
        choose(three, CPU)


# -- CPUs and GPUs in one bundle


@pytest.fixture
def mixed(three: Manifest) -> Manifest:
    """The manifest of a bundle for a GPU and a level of CPU, built with CUDA 13."""
    gpu = three.engines[0].model_copy(update={"target": "nvidia-l4"})
    devices = {"nvidia-l4": "cuda", NAMES[1]: "cpu"}
    runtime = {
        **device_policy(devices),
        "targets": {"nvidia-l4": "x86-64-v3", NAMES[1]: "x86-64-v2"},
        "gpus": {"nvidia-l4": {"sm": "sm_89"}},
    }
    engines = (gpu, next(row for row in three.engines if row.target == NAMES[1]))
    asked = three.requires.model_copy(update={"cuda": "13.0", "driver": "580.65.06"})
    return three.model_copy(update={"engines": engines, "runtime": runtime, "requires": asked})


def on_gpu(monkeypatch: pytest.MonkeyPatch, found: tuple[int, int] | None) -> None:
    monkeypatch.setattr(compatibility, "_cpu_flags", lambda: flags_of("x86-64-v3"))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(compatibility, "_driver", lambda: "590.1")
    monkeypatch.setattr(targets, "capability", lambda: found)


def test_a_gpu_that_fits_is_taken_before_the_cpu(mixed: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu(monkeypatch, (8, 9))
    assert device_for(mixed) == torch.device("cuda")
    choice = choose(mixed, device_for(mixed))
    assert (choice.target, choice.why) == ("nvidia-l4", "its sm_89 is this GPU's own")
    assert choice.others == {NAMES[1]: "device: found cuda, required cpu"}


def test_without_a_gpu_the_cpus_engines_are_taken_and_cuda_is_not_asked_for(
    mixed: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_gpu(monkeypatch, None)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert device_for(mixed) == CPU
    choice = choose(mixed, CPU)
    assert choice.target == NAMES[1]
    assert choice.others == {"nvidia-l4": "device: found cpu, required cuda"}


def test_a_gpu_that_does_not_fit_is_left_alone_and_the_log_says_why(
    mixed: Manifest, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    on_gpu(monkeypatch, (7, 5))
    with caplog.at_level(logging.INFO, "diffkiln"):
        assert device_for(mixed) == CPU
    assert "not on the GPU" in caplog.text
    assert "gpu: found sm_75, required sm_89" in caplog.text


def test_a_caller_who_wants_the_gpu_is_told_of_gpus_alone(mixed: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu(monkeypatch, None)
    monkeypatch.setattr(targets, "capability", lambda: None)
    with pytest.raises(Incompatible, match=r"required nvidia-l4 \(sm_89\), which"):
        targets.check_device(mixed, device_for(mixed, "cuda"))


def test_devices_are_said_one_by_one_only_where_they_differ() -> None:
    assert device_policy({"a": "cuda", "b": "cuda"}) == {"device": "cuda"}
    assert device_policy({"a": "cpu", "b": "cuda"}) == {"device": "cpu", "devices": {"a": "cpu", "b": "cuda"}}


def test_a_reader_must_know_that_devices_are_mixed_as_long_as_they_are() -> None:
    assert device_features({"channels_last"}, {"a": "cpu", "b": "cuda"}) == ("channels_last", "mixed_devices")
    assert device_features({"mixed_devices"}, {"a": "cpu"}) == ()


# -- GPUs, from their numbers alone


@pytest.mark.parametrize(
    ("found", "sm", "ptx", "rank"),
    [
        ((9, 0), "sm_90", None, EXACT),
        ((9, 0), "sm_90a", None, EXACT),
        ((8, 9), "sm_86", None, SAME_MAJOR),
        ((8, 6), "sm_89", None, None),  # an earlier minor version
        ((9, 0), "sm_89", None, None),  # another major one
        ((10, 3), "sm_100a", None, None),
        ((10, 3), "sm_100f", None, SAME_MAJOR),
        ((12, 0), "sm_100f", None, None),
        ((12, 0), "sm_90", "compute_90", PTX),
        ((12, 0), "sm_90a", "compute_90a", None),  # PTX that is for one capability alone
        ((10, 3), "sm_90", "compute_100f", None),
        ((8, 0), "sm_90", "compute_90", None),  # PTX of a later capability
        ((8, 9), "sm_86", "compute_86", SAME_MAJOR),
        (None, "sm_90", "compute_90", None),
    ],
)
def test_what_runs_on_which_gpu(found: tuple[int, int] | None, sm: str, ptx: str | None, rank: int | None) -> None:
    fit = gpu_fit(found, sm, ptx)
    assert fit.rank == rank
    assert sm in fit.why or (ptx or "") in fit.why
    assert (rank is None) == ("found" in fit.why)


def test_an_architecture_that_cannot_be_read_is_refused() -> None:
    with pytest.raises(Incompatible, match="'gfx942', which this diffkiln cannot read"):
        gpu_fit((9, 0), "gfx942")


def for_gpus(manifest: Manifest) -> Manifest:
    """The same engines, said to be for GPUs."""
    rows = {
        NAMES[0]: {"sm": "sm_80"},
        NAMES[1]: {"sm": "sm_86"},
        NAMES[2]: {"sm": "sm_75", "ptx": "compute_75"},
    }
    runtime = manifest.runtime | {"device": "cuda", "targets": dict.fromkeys(rows, "x86-64-v2"), "gpus": rows}
    return manifest.model_copy(update={"runtime": runtime})


@pytest.mark.parametrize(
    ("capability", "name", "why"),
    [
        ((8, 6), NAMES[1], "its sm_86 is this GPU's own"),
        ((8, 9), NAMES[1], "code for sm_86 runs on this GPU, which is sm_89"),
        ((8, 0), NAMES[0], "its sm_80 is this GPU's own"),
        ((9, 0), NAMES[2], "the driver compiles its PTX, compute_75, for this GPU, which is sm_90"),
    ],
)
def test_a_gpu_gets_its_own_engines_then_those_of_its_major_then_ptx(
    three: Manifest, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], name: str, why: str
) -> None:
    monkeypatch.setattr(targets, "capability", lambda: capability)
    choice = choose(for_gpus(three), torch.device("cuda"))
    assert (choice.target, choice.why) == (name, why)


def test_a_gpu_that_fits_none_is_told_found_against_required(three: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "capability", lambda: (7, 0))
    with pytest.raises(Incompatible) as caught:
        choose(for_gpus(three), torch.device("cuda"))
    for sm in ("sm_80", "sm_86", "sm_75"):
        assert f"gpu: found sm_70, required {sm}" in str(caught.value)


def test_engines_that_run_on_one_gpu_alone_are_for_no_later_one(
    three: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = for_gpus(three)
    gpus = {name: row | {"exact": True} for name, row in manifest.runtime["gpus"].items()}  # type: ignore[union-attr]
    exact = manifest.model_copy(update={"runtime": manifest.runtime | {"gpus": gpus}})
    monkeypatch.setattr(targets, "capability", lambda: (8, 6))
    assert choose(exact, torch.device("cuda")).target == NAMES[1]
    monkeypatch.setattr(targets, "capability", lambda: (8, 9))
    with pytest.raises(Incompatible, match="required sm_86, which these engines are for and no other"):
        choose(exact, torch.device("cuda"))


def test_packages_are_those_of_the_target_that_is_used(three: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = for_gpus(three)
    gpus = manifest.runtime["gpus"] | {NAMES[1]: {"sm": "sm_86", "packages": {"no-such-library": "==1.7.1"}}}  # type: ignore[operator]
    needing = manifest.model_copy(update={"runtime": manifest.runtime | {"gpus": gpus}})
    monkeypatch.setattr(targets, "capability", lambda: (8, 6))
    choice = choose(needing, torch.device("cuda"))
    assert choice.target == NAMES[0]
    assert "no-such-library: found nothing, required ==1.7.1" in choice.others[NAMES[1]]


@pytest.mark.parametrize("as_diffusers", [False, True])
def test_a_bundle_for_a_gpu_on_a_machine_without_one_fails_with_one_sentence(
    copy: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    as_diffusers: bool,
) -> None:
    monkeypatch.setattr(targets, "capability", lambda: None)
    monkeypatch.setattr("diffkiln.runtime.opening.engine_class", lambda _: pytest.fail("an engine was reached"))
    runtime = {"device": "cuda", "gpus": {"cpu-x86-64-v3": {"sm": "sm_90"}}}
    rewritten(copy, lambda manifest: manifest.model_copy(update={"runtime": manifest.runtime | runtime}))
    with pytest.raises(Incompatible) as caught:
        diffkiln.load(copy, as_diffusers=as_diffusers)
    message = str(caught.value)
    assert "\n" not in message
    assert "found none that torch" in message
    assert "required cpu-x86-64-v3 (sm_90)" in message
    assert "compile its spec for the CPU" in message
