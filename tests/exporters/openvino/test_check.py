"""What OpenVINO takes, from a spec, a component without weights and a program's types alone."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from diffkiln.errors import IllegalPlan, SpecError
from diffkiln.exporters.openvino.check import TYPES, type_problems
from diffkiln.passes import manager
from diffkiln.passes.base import State
from diffkiln.program import Input, Program, Ref, TensorType
from diffkiln.runtime.engines.openvino.engine import DTYPES
from diffkiln.spec import TargetSpec, resolve_target
from tests.passes.plans import CPU, checked, ghost, placed

COMPILE = {"name": "compile", "component": "transformer", "backend": "openvino"}
V4 = resolve_target(TargetSpec(device="cpu", isa="x86-64-v4"))
L4 = resolve_target(TargetSpec(device="cuda", gpu="nvidia-l4"))


def one(dtype: str) -> Program:
    kind = TensorType(dtype, (2, 3))
    return Program("p", (Input("%x", kind),), (), (Ref("%x"),), {"%x": kind})


def test_the_whole_component_with_its_weights_unless_the_spec_says_otherwise():
    after, report = manager.run(ghost("flux"), checked(ghost("flux"), COMPILE))
    assert report[0].notes == ("whole by openvino",)
    assert after.compile[0].options == {"weights": "engine"}
    assert after.compile[0].holds_weights


@pytest.mark.parametrize("more", [{"scope": "blocks"}, {"weights": "input"}])
def test_blocks_and_whoever_asks_for_it_have_weights_as_inputs(more):
    after, _ = manager.run(ghost("flux"), checked(ghost("flux"), COMPILE | more))
    assert after.compile[0].options == {"weights": "input"}
    assert not after.compile[0].holds_weights


def test_options_are_lowered_as_they_are_stated():
    stated = {"inference_precision": "bf16", "performance_mode": "throughput", "threads": 4, "streams": 2}
    after, _ = manager.run(ghost("flux"), placed(COMPILE | stated), [V4])
    assert after.compile[0].options == stated | {"weights": "engine"}


@pytest.mark.parametrize(
    ("options", "where"),
    [
        ({"scope": "blocks", "weights": "engine"}, "weights"),
        ({"between": True}, "between"),
        ({"weight_budget_gb": 2}, "weight_budget_gb"),
        ({"flags": {"conv_1x1_as_mm": True}}, "flags"),
        ({"inference_precision": "f16"}, "inference_precision"),
        ({"performance_mode": "fast"}, "performance_mode"),
        ({"threads": 0}, "threads"),
        ({"streams": 2.5}, "streams"),
        ({"weight_format": "int2"}, "weight_format"),
        ({"weight_format": "int8", "scope": "blocks"}, "weight_format"),
        ({"weight_format": "int4", "weights": "input"}, "weight_format"),
        ({"weight_format": "int8", "group_size": 64}, "group_size"),
        ({"weight_format": "int4", "group_size": 16}, "group_size"),
        ({"backend": "onnx", "threads": 2}, "threads"),
    ],
)
def test_wrong_options_are_refused_by_path(options, where):
    with pytest.raises(SpecError, match=rf"\$\.passes\[0\]\.{where}"):
        placed(COMPILE | options)


@pytest.mark.parametrize(("target", "refused"), [(CPU, True), (V4, False)])
def test_bfloat16_is_for_targets_whose_cpus_may_have_it(target, refused):
    reason = r"inference_precision: found bf16 for cpu-x86-64-v3, .*required f32\. Remove it, or choose"
    with pytest.raises(IllegalPlan, match=reason) if refused else nullcontext():
        manager.run(ghost("flux"), placed(COMPILE | {"inference_precision": "bf16"}), [target])


def test_gpus_are_refused():
    with pytest.raises(IllegalPlan, match=r"engines of OpenVINO run on CPUs, the target is nvidia-l4"):
        manager.run(ghost("flux"), placed(COMPILE), [L4])


def test_a_choice_of_kernel_is_refused():
    chosen = {"name": "attention_backend", "component": "transformer", "backend": "native_math"}
    with pytest.raises(IllegalPlan, match="OpenVINO computes attention in its own way"):
        checked(ghost("flux"), chosen, COMPILE)


def test_weights_are_stored_in_fewer_bits_once():
    quantize = {"name": "quantize", "component": "transformer", "type": "int8_weight_only"}
    with pytest.raises(IllegalPlan, match=r"weight_format: another pass has already stored .*Remove one of the two"):
        checked(ghost("flux"), quantize, COMPILE | {"weight_format": "int8"})


def test_weights_in_eight_bits_without_a_form_in_openvino_are_refused():
    with pytest.raises(IllegalPlan, match=r"backend: another pass has stored the weights .*Remove one of the two"):
        checked(ghost("flux"), {"name": "layerwise_cast", "component": "transformer"}, COMPILE)


def test_arithmetic_without_weights_is_refused():
    plan = State("Pipeline", {}, scheduler=object())
    with pytest.raises(IllegalPlan, match=r"backend: scheduler has no weights.*Choose aot_inductor"):
        checked(plan, COMPILE | {"component": "scheduler"})


def test_without_its_packages_says_what_installs_them(monkeypatch):
    monkeypatch.setattr(
        "diffkiln.exporters.openvino.check.find_spec", lambda name: None if name == "openvino" else name
    )
    with pytest.raises(IllegalPlan, match=r"openvino: not installed.*pip install 'diffkiln\[openvino\]'"):
        checked(ghost("flux"), COMPILE)


def test_fewer_bits_without_nncf_say_what_installs_it(monkeypatch):
    monkeypatch.setattr("diffkiln.exporters.openvino.check.find_spec", lambda name: None if name == "nncf" else name)
    with pytest.raises(IllegalPlan, match=r"nncf is not installed.*pip install 'diffkiln\[nncf\]'"):
        checked(ghost("flux"), COMPILE | {"weight_format": "int8"})
    assert checked(ghost("flux"), COMPILE)


@pytest.mark.parametrize("dtype", TYPES)
def test_types_that_are_taken(dtype):
    assert not list(type_problems(one(dtype)))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float8_e4m3fn", "complex32"])
def test_other_types_are_told_found_against_required(dtype):
    (reason,) = type_problems(one(dtype))
    assert reason == f"found {dtype}, required one of {', '.join(TYPES)} (x of p)"


def test_weights_in_a_type_that_it_lacks_ask_for_a_cast():
    layer = torch.nn.Linear(4, 4, device="meta").requires_grad_(False).to(torch.bfloat16)
    with pytest.raises(IllegalPlan, match=r'found bfloat16.*\{"name": "cast".*"dtype": "float32"\}'):
        checked(State("Pipeline", {"transformer": layer}), COMPILE)


def test_the_engine_knows_the_types_that_the_exporter_takes():
    assert set(DTYPES.values()) == set(TYPES)
