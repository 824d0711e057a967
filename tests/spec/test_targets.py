import pytest

from diffkiln.errors import SpecError
from diffkiln.spec import CPU_FLAGS, GPUS, TARGETS, TargetSpec, find_gpu, parse_spec, resolve_target, resolve_targets


def test_the_rtx_4090_is_what_its_data_sheet_says():
    target = resolve_target(TargetSpec(device="cuda", gpu="nvidia-rtx-4090"))
    assert (target.name, target.device, target.architecture) == ("nvidia-rtx-4090", "cuda", "Ada")
    assert (target.compute_capability, target.sm) == ("8.9", "sm_89")
    assert target.memory_bytes == 24 * 10**9
    assert target.memory_bandwidth == 1008e9
    assert target.h2d_bandwidth == pytest.approx(31.5e9, rel=0.001)
    assert target.isa == "x86-64-v3"


def test_the_table_is_complete_and_plausible():
    assert len(GPUS) >= 24
    for name, gpu in GPUS.items():
        assert gpu.name == name == name.lower()
        assert gpu.architecture in {"Turing", "Ampere", "Ada", "Hopper", "Blackwell"}
        assert gpu.memory_bytes is not None
        assert 8e9 <= gpu.memory_bytes <= 300e9
        assert gpu.memory_bandwidth is not None
        assert 100e9 <= gpu.memory_bandwidth <= 10e12
        assert gpu.h2d_bandwidth in {other.h2d_bandwidth for other in GPUS.values()}


def test_every_name_resolves_to_itself():
    for name, target in TARGETS.items():
        spec = {"device": "cpu", "isa": target.isa} if target.device == "cpu" else {"device": "cuda", "gpu": name}
        assert resolve_target(TargetSpec.model_validate(spec)) == target


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("RTX 4090", "nvidia-rtx-4090"),
        ("rtx4090", "nvidia-rtx-4090"),
        ("NVIDIA GeForce RTX 4090", "nvidia-rtx-4090"),
        ("NVIDIA_L40S", "nvidia-l40s"),
        ("Tesla T4", "nvidia-t4"),
        ("NVIDIA H100 80GB HBM3", "nvidia-h100-sxm"),
        ("NVIDIA A100-SXM4-80GB", "nvidia-a100-80gb-sxm"),
        ("NVIDIA RTX 6000 Ada Generation", "nvidia-rtx-6000-ada"),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "nvidia-rtx-pro-6000-blackwell"),
    ],
)
def test_knows_a_gpu_as_people_and_drivers_spell_it(spelling, name):
    assert find_gpu(spelling) == GPUS[name]


@pytest.mark.parametrize(
    ("name", "mend"),
    [
        ("nvidia-rtx-4091", 'Did you mean "nvidia-rtx-4090"?'),
        ("h100", 'Did you mean "nvidia-h100-pcie" or "nvidia-h100-sxm" or "nvidia-h100-nvl"?'),
        ("RTX 3060", 'Did you mean "nvidia-rtx-3060-12gb"?'),
        ("abacus", "`diffkiln targets` lists them; or write the numbers of the GPU out"),
        ("nvidia", "`diffkiln targets` lists them; or write the numbers of the GPU out"),
    ],
)
def test_unknown_gpu_gets_a_mend(name, mend):
    with pytest.raises(SpecError) as caught:
        resolve_target(TargetSpec(device="cuda", gpu=name), "$.target[2]")
    [problem] = caught.value.problems
    assert problem.where == "$.target[2].gpu"
    assert problem.hint == mend


def test_numbers_written_out():
    spec = TargetSpec(device="cuda", compute_capability="12.0", memory_gb=31.5, h2d_gb_per_s=50, driver="575")
    target = resolve_target(spec)
    assert (target.name, target.sm, target.architecture) == ("cuda-sm_120-31.5gb", "sm_120", "Blackwell")
    assert (target.memory_bytes, target.h2d_bandwidth, target.memory_bandwidth) == (31_500_000_000, 50e9, None)
    assert (target.driver, target.cuda) == ("575", None)


def test_an_unknown_compute_capability_has_no_architecture():
    spec = TargetSpec(device="cuda", compute_capability="99.0", memory_gb=1, h2d_gb_per_s=1, memory_gb_per_s=2)
    target = resolve_target(spec)
    assert (target.architecture, target.sm, target.memory_bandwidth) == (None, "sm_990", 2e9)


def test_another_host_cpu_is_another_target():
    target = resolve_target(TargetSpec(device="cuda", gpu="nvidia-l4", isa="x86-64-v4"))
    assert (target.name, target.isa) == ("nvidia-l4-x86-64-v4", "x86-64-v4")


def test_cpu_has_no_numbers_of_a_gpu():
    target = resolve_target(TargetSpec(device="cpu"))
    assert (target.name, target.sm, target.memory_bytes) == ("cpu-x86-64-v3", None, None)


def test_all_targets_of_a_spec_resolve_in_order(example):
    example["target"] = [{"device": "cpu"}, {"device": "cuda", "gpu": "H200"}]
    assert [target.name for target in resolve_targets(parse_spec(example))] == ["cpu-x86-64-v3", "nvidia-h200"]


def test_two_spellings_of_one_target_are_a_repetition(example):
    example["target"] = [{"device": "cuda", "gpu": "L4"}, {"device": "cuda", "gpu": "nvidia-l4"}]
    with pytest.raises(SpecError, match=r"\$\.target\[1\]: nvidia-l4 is listed twice"):
        parse_spec(example)


def test_cpu_levels_include_those_below():
    v2, v3, v4 = (CPU_FLAGS[level] for level in ("x86-64-v2", "x86-64-v3", "x86-64-v4"))
    assert v2 < v3 < v4
    assert {"sse2", "cx16", "lahf_lm", "popcnt", "pni", "ssse3", "sse4_1", "sse4_2"} <= v2
    assert v3 - v2 == {"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave"}
    assert v4 - v3 == {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}


def test_gpus_of_one_board_exchange_by_nvlink_and_others_over_the_slot():
    assert GPUS["nvidia-h100-sxm"].peer_bandwidth == 450e9
    assert GPUS["nvidia-rtx-4090"].peer_bandwidth == GPUS["nvidia-rtx-4090"].h2d_bandwidth
