"""attention_backend: what is illegal, and the chosen kernel in the runtime, in diffusers and in engines."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import diffkiln
from diffkiln.bundle import open_bundle
from diffkiln.errors import IllegalPlan, Incompatible, MissingDependency, SpecError
from diffkiln.interpreter.portable import portable
from diffkiln.interpreter.quiet import quiet_libraries
from diffkiln.passes import manager
from diffkiln.passes.base import State
from diffkiln.passes.program.attention_backend import choose_attention
from diffkiln.program import ATTENTION, KERNELS, PACKAGED, SDPA, module_from_json
from diffkiln.runtime import loading
from diffkiln.runtime.diffusers import loading as as_diffusers
from diffkiln.spec import TargetSpec, resolve_target
from tests.passes.plans import A100, CPU, H200, checked, ghost, placed
from tests.passes.test_cache_schedule import draw, eager, spec
from tests.pipelines import WARNING_FILTERS
from tests.runtime.test_attention import pretend

pytestmark = [pytest.mark.filterwarnings(text) for text in WARNING_FILTERS]
T4 = resolve_target(TargetSpec(device="cuda", gpu="nvidia-t4"))
BF16 = {"name": "cast", "component": "transformer", "dtype": "bfloat16"}


def entry(backend: str, component: str = "transformer") -> dict[str, Any]:
    return {"name": "attention_backend", "component": component, "backend": backend}


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Has importlib.metadata find a distribution, of one version at a time; nothing is there to import."""

    def install(package: str, version: str) -> None:
        for before in tmp_path.glob("*.dist-info"):
            shutil.rmtree(before)
        folder = tmp_path / f"{package.replace('-', '_')}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
        monkeypatch.syspath_prepend(str(tmp_path))

    return install


# -- from the spec and the configuration --


@pytest.mark.parametrize(
    ("word", "reason"),
    [
        ("native", "torch chooses a kernel at each call without this pass"),
        ("flash", "Choose native_flash for torch's, flash_2 for the package's"),
        ("flex", "a bundle compiles nothing when it is loaded"),
        ("flash_4_hub", "a bundle fetches nothing"),
        ("native_mat", 'Did you mean "native_math"?'),
    ],
)
def test_words_that_choose_no_kernel_are_refused_with_the_reason(word, reason):
    with pytest.raises(SpecError) as caught:
        placed(entry(word))
    (problem,) = caught.value.problems
    assert problem.where == "$.passes[0].backend"
    assert reason in str(problem)


@pytest.mark.parametrize(("word", "name"), [("_native_math", "native_math"), ("_flash_3", "flash_3"), ("sage", "sage")])
def test_diffusers_spellings_are_read(word, name):
    (item,) = placed(entry(word))
    assert item.step.options() == {"component": "transformer", "backend": name}


@pytest.mark.parametrize(
    ("backend", "target", "reason"),
    [
        (
            "native_cudnn",
            CPU,
            "native_cudnn is for CUDA GPUs, and the target is cpu-x86-64-v3. Choose one of native_",
        ),
        ("native_flash", T4, "native_flash needs SM 8.0 or later, not 7.5, and the target is nvidia-t4"),
        ("native_flash", H200, "native_flash takes float16 and bfloat16, and transformer is in float32"),
        ("flash_3", A100, "flash_3 is for SM 9.0, not 8.0"),
        ("sage", H200, "sage needs sageattention >=2.1.1,<3, which is not installed. pip install git+"),
        ("flash_2", H200, "flash_2 needs flash-attn >=2.6.3,<3, which is not installed. pip install flash-attn"),
    ],
)
def test_what_the_target_or_the_machine_lacks_is_told_before_anything_is_built(backend, target, reason):
    with pytest.raises(IllegalPlan) as caught:
        checked(ghost("flux"), entry(backend), target=target)
    assert all(problem.where == "$.passes[0].backend" for problem in caught.value.problems)
    assert reason in str(caught.value)


def test_a_cast_before_it_makes_the_type_fit():
    plan = ghost("flux")
    after, report = manager.run(plan, checked(plan, BF16, entry("native_flash"), target=H200), [H200])
    assert "attention_chosen(transformer)" in map(str, after.facts)
    assert report[-1].notes == ("attention by native_flash",)


@pytest.mark.parametrize("backend", PACKAGED)
def test_a_package_that_is_installed_is_legal_and_one_of_another_version_is_not(backend, installed):
    versions = {"flash_2": "2.8.3.post2", "flash_3": "3.0.0b1", "flash_4": "4.0.0b36", "sage": "2.2.0"}
    package = KERNELS[backend].package
    installed(package, versions.get(backend, "0.0.35"))
    (_, item) = checked(ghost("flux"), BF16, entry(backend), target=H200)
    assert item.step.packages() == {package: KERNELS[backend].versions}
    installed(package, "0.0.1")
    with pytest.raises(IllegalPlan, match=rf"needs {package} .*, found 0\.0\.1"):
        checked(ghost("flux"), BF16, entry(backend), target=H200)


def test_every_target_must_have_the_kernel():
    with pytest.raises(IllegalPlan, match="the target is cpu-x86-64-v3"):
        manager.run(ghost("flux"), placed(BF16, entry("native_flash"), entry("native_cudnn", "vae")), [H200, CPU])


def test_a_component_without_attention_is_refused():
    plan = State("Pipeline", {"transformer": torch.nn.Linear(1, 1)})
    with pytest.raises(IllegalPlan, match=r"Linear has no attention\. Remove it"):
        checked(plan, entry("native_math"))


def test_a_text_encoder_that_computes_its_attention_itself_is_refused(monkeypatch):
    plan = ghost("flux")
    checked(plan, entry("native_math", "text_encoder"))
    monkeypatch.setattr(plan.modules["text_encoder"].config, "_attn_implementation_internal", "eager")
    with pytest.raises(IllegalPlan, match=r"computes its attention itself \(eager\)"):
        checked(plan, entry("native_math", "text_encoder"))


def test_a_packages_kernel_does_not_compile(installed):
    installed("sageattention", "2.2.0")
    compiled = {"name": "compile", "component": "transformer"}
    with pytest.raises(IllegalPlan, match="compile cannot follow attention_backend: an engine holds torch's operators"):
        checked(ghost("flux"), BF16, entry("sage"), compiled, target=H200)
    checked(ghost("flux"), entry("native_math"), compiled)


def test_it_stands_after_quantize_and_before_schedules():
    quantize = {"name": "quantize", "component": "transformer", "type": "int8_weight_only"}
    schedule = {"name": "cache_schedule", "component": "transformer", "method": "fora", "interval": 2}
    checked(ghost("flux"), quantize, entry("native_math"), schedule)
    with pytest.raises(IllegalPlan, match="quantize must come before attention_backend"):
        checked(ghost("flux"), entry("native_math"), quantize)
    with pytest.raises(IllegalPlan, match="attention_backend must come before cache_schedule"):
        checked(ghost("flux"), schedule, entry("native_math"))


# -- from the recording --


def test_masks_and_widths_that_a_kernel_does_not_take_are_told_before_weights_are_read(families, tmp_path, monkeypatch):
    made = spec(families, "flux") | {"target": {"device": "cuda", "gpu": "nvidia-h200"}}
    made["source"]["dtype"] = "bfloat16"
    made["passes"] = [entry("native_flash", "text_encoder_2")]
    monkeypatch.setattr("diffkiln.compiler.compile.stream_weights", None)
    with pytest.raises(IllegalPlan) as caught:
        diffkiln.compile(made, tmp_path / "bundle")
    (problem,) = caught.value.problems
    assert problem.where == "$.passes[0].backend"
    assert problem.reason == (
        "native_flash cannot compute all of it: text_encoder_2 has attention with a mask, and it takes none"
    )


# -- what runs --


def spec_with(families: Path, family: str, *passes: dict[str, Any], **changed: Any) -> dict[str, Any]:
    made = spec(families, family) | {"passes": list(passes)} | changed
    made["inputs"]["num_inference_steps"] = 2
    return made


def with_math(pipe: Any, *components: str) -> Any:
    """The pipeline with the components' attention by torch's own switch."""

    def switched(method):
        def called(*args: Any, **kwargs: Any) -> Any:
            with sdpa_kernel(SDPBackend.MATH):
                return method(*args, **kwargs)

        return called

    for name in components:
        module = pipe.components[name]
        for method in ("forward", "decode"):
            if hasattr(module, method):
                setattr(module, method, switched(getattr(module, method)))
    return pipe


def recorded(path: Path, component: str) -> list[Any]:
    """The attentions of a component, as its bundle has them."""
    module = module_from_json(json.loads((path / f"programs/{component}.json").read_text()))
    every = [op for program in (*module.programs.values(), *module.regions.values()) for op in program.ops]
    return [op for op in every if op.name in (SDPA, ATTENTION)]


@pytest.mark.parametrize(
    ("family", "components", "offloaded"),
    [("flux", ("transformer", "text_encoder", "text_encoder_2", "vae"), True), ("sd", ("unet",), False)],
)
def test_the_runtime_and_diffusers_run_the_kernel_that_was_chosen(family, components, offloaded, families, tmp_path):
    mapping = {"name": "attention_backend", "mapping": {name: {"backend": "native_math"} for name in components}}
    made = spec_with(families, family, mapping)
    if offloaded:
        made["runtime"] = {"offload": {"num_blocks_per_group": 1, "to": "disk"}}
    built = diffkiln.compile(made, tmp_path / "bundle")
    for name in components:
        assert {op.attrs["kernel"] for op in recorded(built.path, name)} == {"native_math"}
    with open_bundle(built.path) as bundle:
        assert "attention_kernels" in bundle.manifest.features_required
    pipe = eager(made)
    plain = draw(pipe, made)
    with diffkiln.load(built.path) as compiled:
        found = draw(compiled, made)
    with quiet_libraries(), portable():
        original = diffkiln.load(built.path, as_diffusers=True)
    original.set_progress_bar_config(disable=True)
    again = draw(original, made)
    assert torch.equal(draw(pipe, made), plain), "other pipelines of the process are as they were"
    wanted = draw(with_math(pipe, *components), made)
    assert not torch.equal(wanted, plain)
    assert torch.equal(found, wanted)
    assert torch.equal(again, wanted)


@pytest.fixture(scope="module")
def sage_bundle(families, tmp_path_factory):
    """A FLUX for an H200 whose transformer's attention SageAttention computes, made where its metadata alone are."""
    root = tmp_path_factory.mktemp("sage")
    folder = root / "sageattention-2.2.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: sageattention\nVersion: 2.2.0\n")
    made = spec_with(families, "flux", entry("sage"), target={"device": "cuda", "gpu": "nvidia-h200"})
    made["source"]["dtype"] = "bfloat16"
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(root))
        return made, diffkiln.compile(made, root / "bundle").path


@pytest.fixture
def anywhere(monkeypatch):
    """Stand-ins of kernels run on this machine's CPU."""
    for home in (loading, as_diffusers):
        monkeypatch.setattr(home, "check_kernels", lambda *_: None)


def test_a_packages_kernel_computes_in_the_place_of_torchs(sage_bundle, installed, anywhere, monkeypatch):
    made, path = sage_bundle
    found = recorded(path, "transformer")
    assert [(op.name, op.attrs["kernel"], op.attrs["causal"]) for op in found] == [(ATTENTION, "sage", False)] * 2
    installed("sageattention", "2.2.0")
    pretend(monkeypatch, "sage")
    pipe = eager(made).to(torch.bfloat16)
    with diffkiln.load(path, device="cpu") as compiled:
        assert torch.equal(draw(compiled, made), draw(pipe, made))


def test_a_bundle_requires_its_package_when_it_is_loaded(sage_bundle, installed):
    _, path = sage_bundle
    with open_bundle(path) as bundle:
        assert bundle.manifest.requires.packages == {"sageattention": ">=2.1.1,<3"}
    for options in ({}, {"as_diffusers": True}):
        with pytest.raises(MissingDependency, match=r"sageattention: found nothing.* pip install git\+https"):
            diffkiln.load(path, device="cpu", **options)
    installed("sageattention", "1.0.6")
    with pytest.raises(MissingDependency, match=r"sageattention: found 1\.0\.6, required >=2\.1\.1,<3\. pip install"):
        diffkiln.load(path, device="cpu")


def test_a_kernel_that_the_machine_has_not_is_refused_when_it_is_loaded(sage_bundle, installed):
    _, path = sage_bundle
    installed("sageattention", "2.2.0")
    for options in ({}, {"as_diffusers": True}):
        with pytest.raises(Incompatible, match="transformer: sage is for CUDA GPUs"):
            diffkiln.load(path, device="cpu", **options)


def test_diffusers_is_told_of_a_packages_kernel(monkeypatch):
    from diffusers.models import attention_dispatch

    registry = attention_dispatch._AttentionBackendRegistry
    before = registry._active_backend
    monkeypatch.setattr(attention_dispatch, "_CAN_USE_SAGE_ATTN", True)
    module = ghost("flux").modules["transformer"]
    choose_attention(module, "transformer", "sage")
    assert {part.processor._attention_backend for part in module.modules() if hasattr(part, "processor")} == {"sage"}
    assert registry._active_backend == before, "it is this component's, not the process's"


@pytest.mark.parametrize(
    ("family", "component", "kernel", "reason"),
    [
        ("sdxl", "unet", "sage", r"the attention of unet \(UNet2DConditionModel\) by sage"),
        ("flux", "text_encoder", "flash_2", r"the attention of text_encoder \(CLIPTextModel\) by flash_2"),
        ("flux", "transformer", "flash_4", r"the attention of transformer \(FluxTransformer2DModel\) by flash_4"),
        ("flux", "transformer", "flash_2", "diffusers cannot use flash_2 for transformer: .*flash-attn"),
    ],
)
def test_what_diffusers_would_ignore_is_refused(family, component, kernel, reason):
    with pytest.raises(Incompatible, match=reason):
        choose_attention(ghost(family).modules[component], component, kernel)
