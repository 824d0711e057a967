"""compile: which regions a backend gets, from configuration alone."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from diffkiln.errors import IllegalPlan, SpecError
from diffkiln.passes import manager
from diffkiln.passes.base import Plan
from diffkiln.program import Input, Module, Op, Program, Ref, TensorType
from diffkiln.record.constants import Constants
from diffkiln.record.pipeline import Recording
from diffkiln.spec import TargetSpec, resolve_target
from tests.passes.plans import CPU, checked, ghost, placed

COMPILE = {"name": "compile", "component": "transformer"}


def test_plan_asks_for_the_blocks_of_the_component():
    plan = ghost("flux")
    after, report = manager.run(plan, checked(plan, COMPILE))
    assert [(request.component, request.backend) for request in after.compile] == [("transformer", "aot_inductor")]
    assert plan.compile == ()
    assert report[0].changed


def test_component_without_blocks_is_refused():
    plan = Plan("Pipeline", {"transformer": torch.nn.Linear(1, 1)})
    with pytest.raises(IllegalPlan, match="Linear declares no repeated blocks"):
        checked(plan, COMPILE)


def test_gpu_target_needs_a_torch_with_cuda_and_no_gpu(monkeypatch):
    plan = ghost("flux")
    target = resolve_target(TargetSpec(device="cuda", gpu="nvidia-l4"))
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(
        IllegalPlan, match=r"\$\.passes\[0\]\.backend: .*nvidia-l4, torch: .*built without CUDA.*pip install"
    ):
        manager.run(plan, placed(COMPILE), [target])
    monkeypatch.setattr("diffkiln.passes.backends.cuda_problems", lambda: iter(()))
    after, _ = manager.run(plan, placed(COMPILE | {"flags": {"max_autotune": True}}), [target])
    assert after.compile[0].options == {"max_autotune": True}


def test_twice_for_one_component_is_refused():
    plan = ghost("flux")
    with pytest.raises(IllegalPlan, match="stands twice"):
        checked(plan, COMPILE, COMPILE)


def test_whole_component_needs_no_blocks():
    plan = Plan("Pipeline", {"transformer": torch.nn.Linear(1, 1, device="meta").requires_grad_(False)})
    after, report = manager.run(plan, checked(plan, COMPILE | {"scope": "whole"}))
    assert [request.component for request in after.compile] == ["transformer"]
    assert report[0].notes == ("whole by aot_inductor",)


def test_onnx_takes_the_whole_component_unless_the_spec_says_otherwise():
    plan = ghost("flux")
    exported = COMPILE | {"backend": "onnx"}
    after, report = manager.run(plan, checked(plan, exported))
    assert [(request.component, request.backend) for request in after.compile] == [("transformer", "onnx")]
    assert report[0].notes == ("whole by onnx",)
    assert manager.run(plan, checked(plan, exported | {"scope": "blocks"}))[1][0].notes == ("blocks by onnx",)
    (place,) = placed(exported)
    assert place.step.packages() == {"onnxruntime": ">=1.31"}
    assert not placed(COMPILE)[0].step.packages()


def test_onnx_takes_gpus():
    plan = ghost("flux")
    manager.run(
        plan, placed(COMPILE | {"backend": "onnx"}), [resolve_target(TargetSpec(device="cuda", gpu="nvidia-l4"))]
    )


def test_onnx_without_its_packages_is_refused_with_what_installs_them(monkeypatch):
    monkeypatch.setattr("diffkiln.passes.backends.find_spec", lambda name: None if name == "onnxscript" else name)
    with pytest.raises(IllegalPlan, match=r"onnxscript: not installed.*pip install 'diffkiln\[onnx\]'"):
        checked(ghost("flux"), COMPILE | {"backend": "onnx"})


def test_onnx_after_a_choice_of_kernel_is_refused():
    chosen = {"name": "attention_backend", "component": "transformer", "backend": "native_math"}
    with pytest.raises(IllegalPlan, match="computes attention in its own way"):
        checked(ghost("flux"), chosen, COMPILE | {"backend": "onnx"})


@pytest.mark.parametrize(("dtype", "where"), [("bfloat16", ["$.passes[0].backend"]), ("float32", [])])
def test_types_that_onnx_runtime_cannot_compute_are_refused_from_the_recording(dtype, where):
    kind = TensorType(dtype, (4,))
    double = Op("aten.add.Tensor", (Ref("%x"), Ref("%x")), ("%1",))
    program = Program("transformer", (Input("%x", kind),), (double,), (Ref("%1"),), {"%x": kind, "%1": kind})
    recording = Recording(
        [{}], {"transformer": Module("transformer", {"transformer": program}, {})}, Constants(), [], []
    )
    with nullcontext() if not where else pytest.raises(IllegalPlan) as caught:
        manager.check_recording(recording, placed(COMPILE | {"backend": "onnx"}), [CPU])
    if where:
        assert [problem.where for problem in caught.value.problems] == where
        assert "found aten.add.Tensor in bfloat16, required float32" in str(caught.value)


def test_arithmetic_of_the_scheduler_is_a_component():
    plan = replace(ghost("flux"), scheduler=object())
    after, _ = manager.run(plan, checked(plan, {"name": "compile", "component": "scheduler"}))
    assert [request.component for request in after.compile] == ["scheduler"]
    with pytest.raises(IllegalPlan, match="no component 'scheduler'"):
        checked(ghost("flux"), {"name": "compile", "component": "scheduler"})


def test_sizes_of_a_range_share_engines_unless_the_spec_says_otherwise():
    plan = replace(ghost("flux"), variants=({}, {}))

    def dynamic(plan, **options):
        return manager.run(plan, placed(COMPILE | options))[0].compile[0].dynamic

    assert not dynamic(plan)
    assert dynamic(replace(plan, ranged=True))
    assert dynamic(plan, dynamic=True)
    assert not dynamic(replace(plan, ranged=True), dynamic=False)


def test_flags_are_recorded_as_options_of_the_engines():
    plan = ghost("sd")
    compiled = {"name": "compile", "component": "vae", "scope": "whole", "flags": {"conv_1x1_as_mm": True}}
    after, _ = manager.run(plan, checked(plan, compiled))
    assert after.compile[0].options == {"conv_1x1_as_mm": True}


@pytest.mark.parametrize(
    ("options", "where", "reason"),
    [
        ({"dynamic": True}, "$.passes[0].dynamic", "one variant"),
        ({"flags": {"max_autotune": True}}, "$.passes[0].flags.max_autotune", "Triton"),
        ({"flags": {"conv_1x1_as_mm": True}}, "$.passes[0].flags.conv_1x1_as_mm", "no convolution of one pixel"),
    ],
)
def test_what_would_decide_nothing_is_refused(options, where, reason):
    plan = ghost("flux")
    with pytest.raises(IllegalPlan) as caught:
        checked(plan, COMPILE | options)
    assert [problem.where for problem in caught.value.problems] == [where]
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("options", "where"),
    [
        ({"fullgraph": False}, "fullgraph"),
        ({"scope": "whole", "between": True}, "between"),
        ({"component": "scheduler", "scope": "blocks"}, "scope"),
        ({"component": "scheduler", "between": True}, "between"),
        ({"flags": {"conv_1x1_as_mn": True}}, "flags.conv_1x1_as_mn"),
        ({"flags": {"conv_1x1_as_mm": 1}}, "flags.conv_1x1_as_mm"),
        ({"scope": "block"}, "scope"),
        ({"backend": "onnx", "between": True}, "between"),
        ({"backend": "onnx", "flags": {"conv_1x1_as_mm": True}}, "flags"),
        ({"backend": "onyx"}, "backend"),
    ],
)
def test_wrong_options_are_refused_by_path(options, where):
    with pytest.raises(SpecError, match=rf"\$\.passes\[0\]\.{where}"):
        placed(COMPILE | options)
