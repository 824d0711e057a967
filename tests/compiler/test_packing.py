"""What goes into a bundle: groups of weights, names of variants, portable configuration."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import diffkiln
from diffkiln.bundle import open_bundle
from diffkiln.compiler.packed import Packed
from diffkiln.compiler.packing import engines as packing_engines
from diffkiln.compiler.packing.engines import _alone, _untried, demands
from diffkiln.compiler.packing.programs import _features
from diffkiln.compiler.packing.targets import retargeted, spec_for, targets_in
from diffkiln.errors import IllegalPlan, PassError, VerifyError
from diffkiln.exporters.artefact import Artefact
from diffkiln.passes.base import CompileRequest
from diffkiln.passes.model.quantize import Quantize
from diffkiln.program import NOISE, Input, Op, Program, TensorType
from diffkiln.program.sizes import Family
from diffkiln.spec import TARGETS
from tests.conftest import DIGITS
from tests.end_to_end.test_families import spec_of
from tests.exporters.regions import CPU, engine_cache
from tests.pipelines import WARNING_FILTERS

pytestmark = [pytest.mark.filterwarnings(text) for text in WARNING_FILTERS]


def digits(**changed):
    data = json.loads((DIGITS / "spec.json").read_text())
    return data | {"passes": []} | changed


def test_blocks_that_move_together_lie_together(tmp_path):
    spec = digits(runtime={"offload": {"num_blocks_per_group": 3, "use_stream": False}})
    built = diffkiln.compile(spec, tmp_path / "bundle", base=DIGITS)
    with open_bundle(built.path) as bundle:
        names = [row.name for row in bundle.manifest.weights["transformer"]]
    assert names == ["rest", "transformer_blocks.0", "single_transformer_blocks.1"]
    with diffkiln.load(built.path) as pipe:
        generator = torch.Generator().manual_seed(2)
        image = pipe("a handwritten two", generator=generator, output_type="pt").images
        assert pipe.executor.store.groups_peak <= 2
        assert torch.isfinite(image).all()


def test_waiting_in_host_memory_means_nothing_on_a_cpu_and_is_refused():
    spec = digits(runtime={"offload": {"num_blocks_per_group": 1, "to": "host"}})
    with pytest.raises(IllegalPlan, match=r"\$\.runtime\.offload\.to"):
        diffkiln.check(spec, base=DIGITS)


def test_regions_that_were_to_share_an_engine_and_cannot_are_told():
    regions = [Program(name, (), (), (), {}, recorded_from="Block") for name in ("Block", "Block-2", "Block-3")]
    request = CompileRequest("transformer", "aot_inductor", {}, dynamic=True)
    families = [Family((region,), {}, {}) for region in regions]
    (notice,) = _alone(request, families)
    assert notice.startswith("transformer: each of Block, Block-2, Block-3 has an engine of its own: they differ by")
    assert not list(_alone(replace(request, dynamic=False), families))
    assert not list(_alone(request, families[:1]))


def test_variants_are_named_by_what_tells_them_apart(tmp_path):
    spec = spec_of("sd", tmp_path)
    one = spec["inputs"]
    spec["inputs"] = [one, one | {"batch_size": 2}, one | {"guidance_scale": 1.0}]
    built = diffkiln.compile(spec, tmp_path / "bundle")
    size, steps = f"{one['height']}x{one['width']}", one["num_inference_steps"]
    with open_bundle(built.path) as bundle:
        names = [variant.name for variant in bundle.manifest.pipeline.variants]
    assert names == [f"{size}-{steps}-steps", f"{size}-{steps}-steps-batch-2", f"{size}-{steps}-steps-3"]


def test_configuration_and_licence_travel_without_names_of_this_machine(tmp_path):
    model = shutil.copytree(DIGITS / "model", tmp_path / "model")
    file = model / "transformer" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"_name_or_path": "/home/somebody/secret"}))
    (model / "README.md").write_text(
        "---\nlicense: cc-by-4.0\nlicense_link: https://example.org/licence\n---\n# Digits\n"
    )
    built = diffkiln.compile(digits(source={"model": str(model)}), tmp_path / "bundle")
    (licence,) = json.loads((built.path / "licences.json").read_text())
    assert (licence["of"], licence["license"]) == ("base model", "cc-by-4.0")
    assert licence["license_link"] == "https://example.org/licence"
    for path in (built.path / "pipeline").rglob("*.json"):
        assert "somebody" not in path.read_text()
    source = json.loads((built.path / "spec.json").read_text())["source"]
    assert set(source) == {"digest"}


def test_spec_of_a_bundle_is_read_again(digits_bundle):
    data = json.loads((digits_bundle / "spec.json").read_text())
    data["source"] = {"model": "model"}
    assert diffkiln.parse_spec(data).passes[0].name == "fuse_qkv"


def test_a_pass_that_gives_the_real_module_another_shape_is_caught(tmp_path, monkeypatch):
    apply = Quantize.apply

    def careless(self, module):
        notes = apply(self, module)
        if not module.x_embedder.bias.is_meta:
            module.x_embedder.bias = torch.nn.Parameter(torch.zeros(99), requires_grad=False)
        return notes

    monkeypatch.setattr(Quantize, "apply", careless)
    spec = digits(passes=[{"name": "quantize", "component": "transformer", "type": "int8_weight_only"}])
    with pytest.raises(
        PassError, match=r"component transformer: the passes left the weight x_embedder\.bias as \(\(99,\)"
    ):
        diffkiln.compile(spec, tmp_path / "bundle", base=DIGITS)
    assert list(tmp_path.iterdir()) == []


def test_an_engine_that_is_wrong_is_not_published(tmp_path, monkeypatch):
    def wrong(*_):
        raise VerifyError("the engine holds values that are not finite")

    monkeypatch.setattr("diffkiln.compiler.packing.engines.self_test", wrong)
    spec = json.loads((DIGITS / "spec.json").read_text())
    with pytest.raises(VerifyError):
        diffkiln.compile(spec, tmp_path / "bundle", base=DIGITS, cache=engine_cache())
    assert list(tmp_path.iterdir()) == []


def test_two_specs_in_one_process_do_not_influence_each_other(tmp_path, digits_bundle):
    spec = json.loads((DIGITS / "spec-int8.json").read_text()) | {"runtime": {}}
    diffkiln.compile(spec, tmp_path / "first", base=DIGITS, cache=engine_cache())
    again = diffkiln.compile(DIGITS / "spec.json", tmp_path / "second", cache=engine_cache())
    with open_bundle(digits_bundle) as bundle:
        assert again.id == bundle.id


L4 = TARGETS["nvidia-l4"]


def artefact(**requires: str) -> Artefact:
    return Artefact("aot_inductor", Path(), (), (), requires=requires, autotuned=requires.get("tuned") == "yes")


def test_what_engines_for_gpus_ask_of_the_machine_adds_up():
    packed = Packed() + demands(CPU, Artefact("onnx", Path(), (), ()))
    assert packed.gpus == {}
    asked = {"sm": "sm_89", "cuda": "13.0", "driver": "580.65.06"}
    packed += demands(L4, artefact(**asked, glibc="2.34", tuned="yes"))
    assert packed.gpus == {"nvidia-l4": {"sm": "sm_89", "autotuned": True}}
    packed += demands(L4, artefact(**asked, glibc="2.9"))
    assert packed.gpus == {"nvidia-l4": {"sm": "sm_89", "autotuned": False}}
    assert packed.requires == {"cuda": "13.0", "driver": "580.65.06", "glibc": "2.34"}


def test_an_engine_that_was_built_without_its_gpu_is_said_to_be_untuned_and_untried():
    once = Packed(notices=tuple(_untried(artefact(), L4)))
    assert (once + once).notices == (
        "the engines for nvidia-l4 were built without its GPU, so nothing is tuned: run `diffkiln retune` where it is",
        "the engines for nvidia-l4 were not tried: this machine cannot run them",
    )


def test_engines_that_are_built_anew_are_what_the_manifest_tells_of(digits_bundle):
    with open_bundle(digits_bundle) as bundle:
        manifest = bundle.manifest
    name = manifest.engines[0].target
    before = {"gpus": {name: {"sm": "sm_89", "autotuned": False}, "gone": {"sm": "sm_80"}}}
    manifest = manifest.model_copy(update={"runtime": {**manifest.runtime, **before}})
    packed = Packed(requires={"cuda": "13.0"}, gpus={name: {"sm": "sm_89", "autotuned": True}})
    isas, devices = {name: "x86-64-v3"}, {name: "cuda"}
    found = retargeted(manifest, manifest.files, manifest.engines, isas, devices, packed)
    assert found.runtime["gpus"] == {name: {"sm": "sm_89", "autotuned": True}}
    assert found.requires.cuda == "13.0"


def test_a_target_that_is_built_anew_stands_in_the_spec_as_it_stood():
    written_out = {"device": "cuda", "compute_capability": "8.9", "memory_gb": 24, "h2d_gb_per_s": 25}
    data = json.dumps({"target": [written_out, {"device": "cuda", "gpu": "nvidia-h200", "driver": "590.0"}]}).encode()
    stated = targets_in(data)
    assert list(stated) == ["cuda-sm_89-24gb", "nvidia-h200"]
    again = json.loads(spec_for(data, list(stated), list(stated.values())))["target"]
    assert [entry.get("compute_capability") for entry in again] == ["8.9", None]
    assert again[1]["driver"] == "590.0"
    assert json.loads(spec_for(data, ["nvidia-h200"], [L4]))["target"][1]["gpu"] == "nvidia-l4"


def test_a_call_says_what_its_runtime_must_know():
    def call(*ops, **source):
        inputs = (Input("%x", TensorType("float32", (1, 3, 8, 8)), source),) if source else ()
        return Program("call", inputs, ops, (), {})

    drawn = {"shape": [4], "dtype": "float32"}
    assert set(_features(call(Op(NOISE, (), ("%0",), attrs=drawn)))) == set()
    assert set(_features(call(Op(NOISE, (), ("%0",), attrs=drawn | {"seeded": False})))) == {"unseeded_noise"}
    assert set(_features(call(kind="image", keyword="image", index=[0]))) == {"image_inputs"}
    quoting = replace(call(), texts=({"quotations": "characters"},))
    assert set(_features(quoting)) == {"quotations"}


def test_what_trying_an_engine_made_lies_beside_it(tmp_path, monkeypatch):
    """TensorRT for RTX compiles kernels when an engine first runs: they come with a bundle that is built on the GPU."""
    monkeypatch.setattr(packing_engines, "learned_by", lambda engine: {"runtime.cache": b"kernels"})
    built = diffkiln.compile(DIGITS / "spec.json", tmp_path / "bundle", cache=engine_cache())
    with open_bundle(built.path) as bundle:
        paths = {row.path for row in bundle.manifest.engines}
        kept = {row.path: row.role for row in bundle.manifest.files if row.path.endswith("runtime.cache")}
    assert kept == {f"{path}/runtime.cache": "native" for path in paths}
