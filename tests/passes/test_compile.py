"""compile: which regions a backend gets, from configuration alone."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from diffkiln import plugins
from diffkiln.errors import IllegalPlan, SpecError
from diffkiln.passes import manager
from diffkiln.passes.base import State
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
    plan = State("Pipeline", {"transformer": torch.nn.Linear(1, 1)})
    with pytest.raises(IllegalPlan, match="Linear has no repeated blocks"):
        checked(plan, COMPILE)


def test_gpu_target_needs_a_torch_with_cuda_and_no_gpu(monkeypatch):
    plan = ghost("flux")
    target = resolve_target(TargetSpec(device="cuda", gpu="nvidia-l4"))
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch, "__version__", "2.12.0+cpu")
    with pytest.raises(
        IllegalPlan, match=r"\$\.passes\[0\]\.backend: .*nvidia-l4, torch: .*built without CUDA.*pip install"
    ):
        manager.run(plan, placed(COMPILE), [target])
    monkeypatch.setattr("diffkiln.exporters.aot_inductor.check.cuda_problems", lambda: iter(()))
    after, _ = manager.run(plan, placed(COMPILE | {"flags": {"max_autotune": True}}), [target])
    assert after.compile[0].options == {"max_autotune": True}


@pytest.mark.parametrize(("name", "value"), [("weight_format", "int8"), ("threads", 4)])
def test_an_option_of_another_backend_names_that_backend(name, value):
    hint = r'aot_inductor has no such option\. Remove it, or choose "backend": "openvino"'
    with pytest.raises(SpecError, match=hint):
        placed(COMPILE | {name: value})


def test_a_field_of_no_backend_is_told_the_nearest():
    with pytest.raises(SpecError, match=r'there is no such field. Did you mean "scope"'):
        placed(COMPILE | {"scop": "whole"})


def test_twice_for_one_component_is_refused():
    plan = ghost("flux")
    with pytest.raises(IllegalPlan, match="stands twice"):
        checked(plan, COMPILE, COMPILE)


def test_whole_component_needs_no_blocks():
    plan = State("Pipeline", {"transformer": torch.nn.Linear(1, 1, device="meta").requires_grad_(False)})
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


RTX_4090, L4, H200, T4 = (
    resolve_target(TargetSpec(device="cuda", gpu=name)) for name in ("rtx 4090", "l4", "h200", "t4")
)


def test_tensorrt_takes_the_whole_component_for_a_gpu_that_is_not_there():
    plan = ghost("flux")
    built = COMPILE | {"backend": "tensorrt"}
    after, report = manager.run(plan, placed(built), [RTX_4090, L4])
    assert [(request.component, request.backend) for request in after.compile] == [("transformer", "tensorrt")]
    assert after.compile[0].options == {}
    assert not after.compile[0].holds_weights
    assert report[0].notes == ("whole by tensorrt",)
    assert manager.run(plan, placed(built | {"scope": "blocks"}), [RTX_4090])[1][0].notes == ("blocks by tensorrt",)


def test_engines_that_hold_their_weights_have_a_budget():
    held = COMPILE | {"backend": "tensorrt", "weights": "engine", "weight_budget_gb": 6}
    after, _ = manager.run(ghost("flux"), placed(held), [RTX_4090])
    assert after.compile[0].options == {"weights": "engine", "weight_budget": 6 * 10**9}
    assert after.compile[0].holds_weights


@pytest.mark.parametrize(
    ("target", "module", "reason"),
    [
        (CPU, None, r"builds for NVIDIA's GPUs, the target is cpu-x86-64-v3\. Choose a GPU"),
        (
            replace(RTX_4090, compute_capability="7.0"),
            None,
            r"found compute capability 7\.0 .*, required 7\.5 or later",
        ),
        (RTX_4090, "tensorrt_rtx", r"sm_89\): found no package tensorrt-rtx, req.*pip install 'diffkiln\[tensorrt\]'"),
        (
            H200,
            "tensorrt",
            r"sm_90\): found no package tensorrt, required .* builds for 7\.5, 8\.6, .*pip install tensorrt, ",
        ),
    ],
)
def test_targets_that_tensorrt_cannot_build_for_are_refused_from_configuration(target, module, reason, monkeypatch):
    monkeypatch.setattr("diffkiln.exporters.tensorrt.check.find_spec", lambda name: None if name == module else name)
    with pytest.raises(IllegalPlan, match=reason) as caught:
        manager.run(ghost("flux"), placed(COMPILE | {"backend": "tensorrt"}), [target])
    assert [problem.where for problem in caught.value.problems] == ["$.passes[0].backend"]


@pytest.mark.parametrize(("dtype", "target"), [("float64", RTX_4090), ("float8_e4m3fn", RTX_4090), ("bfloat16", T4)])
def test_types_that_tensorrt_cannot_compute_are_refused_from_configuration(dtype, target):
    layer = torch.nn.Linear(4, 4, device="meta").requires_grad_(False).to(getattr(torch, dtype))
    with pytest.raises(IllegalPlan, match=rf"cannot compute transformer: found {dtype}.*required .*float16") as caught:
        manager.run(State("Pipeline", {"transformer": layer}), placed(COMPILE | {"backend": "tensorrt"}), [target])
    assert [problem.where for problem in caught.value.problems] == ["$.passes[0].backend"]


def test_tensorrt_after_a_choice_of_kernel_is_refused():
    chosen = {"name": "attention_backend", "component": "transformer", "backend": "native_math"}
    with pytest.raises(IllegalPlan, match="TensorRT computes attention in its own way"):
        manager.run(ghost("flux"), placed(chosen, COMPILE | {"backend": "tensorrt"}), [RTX_4090])


def test_onnx_without_its_packages_is_refused_with_what_installs_them(monkeypatch):
    monkeypatch.setattr("diffkiln.exporters._onnx.needs.find_spec", lambda name: None if name == "onnxscript" else name)
    with pytest.raises(IllegalPlan, match=r"onnxscript: not installed.*pip install 'diffkiln\[onnx\]'"):
        checked(ghost("flux"), COMPILE | {"backend": "onnx"})


def test_onnx_after_a_choice_of_kernel_is_refused():
    chosen = {"name": "attention_backend", "component": "transformer", "backend": "native_math"}
    with pytest.raises(IllegalPlan, match="computes attention in its own way"):
        checked(ghost("flux"), chosen, COMPILE | {"backend": "onnx"})


@pytest.mark.parametrize(
    ("backend", "target", "dtype", "reason"),
    [
        ("onnx", CPU, "bfloat16", "found aten.add.Tensor in bfloat16, required float32"),
        ("onnx", CPU, "float32", None),
        ("tensorrt", RTX_4090, "float64", "found float64, required one of float32"),
        ("tensorrt", RTX_4090, "bfloat16", None),
    ],
)
def test_types_that_a_backend_cannot_compute_are_refused_from_the_recording(backend, target, dtype, reason):
    kind = TensorType(dtype, (4,))
    double = Op("aten.add.Tensor", (Ref("%x"), Ref("%x")), ("%1",))
    program = Program("transformer", (Input("%x", kind),), (double,), (Ref("%1"),), {"%x": kind, "%1": kind})
    recording = Recording(
        [{}], {"transformer": Module("transformer", {"transformer": program}, {})}, Constants(), [], []
    )
    with nullcontext() if not reason else pytest.raises(IllegalPlan) as caught:
        manager.check_recording(recording, placed(COMPILE | {"backend": backend}), [target])
    if reason:
        assert [problem.where for problem in caught.value.problems] == ["$.passes[0].backend"]
        assert reason in str(caught.value)


def test_a_backend_whose_engines_nothing_here_runs_is_refused(monkeypatch):
    installed = plugins.plugins
    monkeypatch.setattr(plugins, "plugins", lambda kind: {} if kind == "engines" else installed(kind))
    with pytest.raises(IllegalPlan, match=r"\.backend: no package that is installed runs the engines of onnx"):
        checked(ghost("flux"), COMPILE | {"backend": "onnx"})


def test_what_asks_for_nothing_is_taken_by_every_backend():
    nothing = {"flags": None, "fullgraph": True, "weights": None, "weight_budget_gb": None}
    for backend in ("aot_inductor", "onnx", "tensorrt", "torch_compile"):
        (place,) = placed(COMPILE | {"backend": backend} | nothing)
        assert place.step.options() == placed(COMPILE | {"backend": backend})[0].step.options()
        assert nothing.items() <= place.step.options().items()


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
        ({"backend": "tensorrt", "between": True}, "between"),
        ({"backend": "tensorrt", "flags": {"conv_1x1_as_mm": True}}, "flags"),
        ({"backend": "onnx", "weights": "engine"}, "weights"),
        ({"weight_budget_gb": 4}, "weight_budget_gb"),
        ({"backend": "tensorrt", "scope": "blocks", "weights": "engine"}, "weights"),
        ({"backend": "tensorrt", "weight_budget_gb": 4}, "weight_budget_gb"),
        ({"backend": "tensorrt", "weights": "engine", "weight_budget_gb": -1}, "weight_budget_gb"),
    ],
)
def test_wrong_options_are_refused_by_path(options, where):
    with pytest.raises(SpecError, match=rf"\$\.passes\[0\]\.{where}"):
        placed(COMPILE | options)
