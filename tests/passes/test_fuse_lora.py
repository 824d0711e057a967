"""fuse_lora: the sum that diffusers' own fuse_lora gives, from files that are pinned by digest."""

import importlib.util
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from diffkiln.errors import IllegalPlan, LimitExceeded, SourceError, SpecError
from diffkiln.models.adapters import check_adapter
from diffkiln.passes import manager
from tests.passes.adapters import adapter, for_both, kohya
from tests.passes.plans import both, checked, ghost, placed, real, types
from tests.pipelines import FAMILIES, WARNING_FILTERS

pytestmark = [pytest.mark.filterwarnings(text) for text in WARNING_FILTERS]


def entry(component: str, *files, **more) -> dict:
    adapters = [{"file": str(file), "scale": scale} for file, scale in files]
    return {"name": "fuse_lora", "component": component, "adapters": adapters, **more}


def fused_by_diffusers(family: str, component: str, *files) -> torch.nn.Module:
    """What a person does by hand, one adapter after the other."""
    pipe = FAMILIES[family].build()
    for file, scale in files:
        pipe.load_lora_weights(str(file.parent), weight_name=file.name)
        pipe.fuse_lora(components=[component], lora_scale=scale)
        pipe.unload_lora_weights()
    return getattr(pipe, component)


def assert_same_weights(found: torch.nn.Module, wanted: torch.nn.Module) -> None:
    theirs = wanted.state_dict()
    assert found.state_dict().keys() == theirs.keys()
    for name, tensor in found.state_dict().items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    ("family", "component", "ending"),
    [
        ("flux", "transformer", "to_q"),
        ("flux", "text_encoder", "q_proj"),
        ("sdxl", "unet", "to_k"),
        ("sdxl", "text_encoder_2", "v_proj"),
        ("wan", "transformer", "to_out.0"),
    ],
)
def test_adapters_are_added_as_diffusers_adds_them(tmp_path, family, component, ending):
    module = real(family, component)
    files = [
        (adapter(tmp_path / "one.safetensors", module, component, ending=ending, seed=1), 0.75),
        (adapter(tmp_path / "two.safetensors", module, component, ending=ending, rank=2, seed=2), -0.5),
    ]
    shadow, found = both(family, component, entry(component, *files))
    assert types(shadow) == types(found) == types(module), "no trace of the adapters' own weights"
    assert not any("lora" in name for name, _ in found.named_modules())
    changed = [
        name for name, tensor in module.state_dict().items() if not torch.equal(tensor, found.state_dict()[name])
    ]
    assert changed
    assert all(name.endswith(f"{ending}.weight") for name in changed)
    assert_same_weights(found, fused_by_diffusers(family, component, *files))


def test_kohyas_format_and_its_alphas_are_read(tmp_path):
    file = kohya(tmp_path / "kohya.safetensors", real("sdxl", "unet"))
    _, found = both("sdxl", "unet", entry("unet", (file, 1.5)))
    assert_same_weights(found, fused_by_diffusers("sdxl", "unet", (file, 1.5)))


def test_the_notes_count_adapters_and_layers(tmp_path):
    module = real("flux", "transformer")
    file = adapter(tmp_path / "a.safetensors", module, "transformer")
    plan = ghost("flux")
    _, report = manager.run(plan, checked(plan, entry("transformer", (file, 1.0))))
    count = sum(name.endswith("to_q") for name, _ in module.named_modules())
    assert report[0].notes == (f"1 adapters added to {count} layers",)


def test_an_adapter_of_another_architecture_is_refused(tmp_path):
    file = adapter(tmp_path / "sdxl.safetensors", real("sdxl", "unet"), "transformer")
    plan = ghost("flux")
    with pytest.raises(IllegalPlan, match=r"adapters\[0\].*another architecture") as caught:
        checked(plan, entry("transformer", (file, 1.0)))
    assert "trained on this model" in caught.value.problems[0].hint


def test_an_adapter_of_another_width_is_refused(tmp_path):
    module = torch.nn.ModuleDict({"transformer_blocks": torch.nn.ModuleList([torch.nn.ModuleDict({})])})
    module["transformer_blocks"][0]["attn"] = torch.nn.ModuleDict({"to_q": torch.nn.Linear(48, 48)})
    file = adapter(tmp_path / "wide.safetensors", module, "transformer")
    plan = ghost("flux")
    with pytest.raises(IllegalPlan, match=r"such as transformer_blocks\.0\.attn\.to_q"):
        checked(plan, entry("transformer", (file, 1.0)))


def test_an_adapter_for_another_component_says_for_which(tmp_path):
    file = adapter(tmp_path / "te.safetensors", real("flux", "text_encoder"), "text_encoder", ending="q_proj")
    plan = ghost("flux")
    with pytest.raises(IllegalPlan, match="no weights for transformer; it has some for text_encoder"):
        checked(plan, entry("transformer", (file, 1.0)))


def test_a_file_that_is_not_there_names_the_place_where_it_was_looked_for(tmp_path):
    plan = ghost("flux")
    with pytest.raises(SourceError, match=r"cannot be read at .*nowhere\.safetensors: No such file"):
        checked(plan, entry("transformer", (tmp_path / "nowhere.safetensors", 1.0)))


def test_a_file_that_is_no_safetensors_file_is_refused(tmp_path):
    (tmp_path / "broken.safetensors").write_bytes(b"not an adapter")
    plan = ghost("flux")
    with pytest.raises(IllegalPlan, match=r"broken\.safetensors is not an adapter that diffusers reads"):
        checked(plan, entry("transformer", (tmp_path / "broken.safetensors", 1.0)))


@pytest.mark.parametrize(
    ("given", "where"),
    [
        ({"file": "adapter.bin"}, "file"),
        ({"file": "a.safetensors", "repo": "owner/name"}, "revision"),
        ({"file": "a.safetensors", "repo": "owner/name", "revision": "main"}, "revision"),
        ({"file": "a.safetensors", "revision": "0" * 40}, "revision"),
        ({"file": "a.safetensors", "repo": "not an id", "revision": "0" * 40}, "repo"),
    ],
)
def test_adapters_are_exact(given, where):
    with pytest.raises(SpecError) as caught:
        placed({"name": "fuse_lora", "component": "transformer", "adapters": [given]})
    assert caught.value.problems[0].where == f"$.passes[0].adapters[0].{where}"


@pytest.mark.parametrize("after", ["fuse_qkv", "quantize"])
def test_after_what_changes_its_layers_it_is_refused_by_name(tmp_path, after):
    file = adapter(tmp_path / "a.safetensors", real("flux", "transformer"), "transformer")
    first = {"name": after, "component": "transformer"} | ({"type": "int8_weight_only"} if after == "quantize" else {})
    plan = ghost("flux")
    with pytest.raises(IllegalPlan, match=rf"fuse_lora must come before {after}"):
        checked(plan, first, entry("transformer", (file, 1.0)))


def test_without_peft_the_extra_is_named(tmp_path, monkeypatch):
    file = adapter(tmp_path / "a.safetensors", real("flux", "transformer"), "transformer")
    found = importlib.util.find_spec
    monkeypatch.setattr(
        "diffkiln.passes.model.fuse_lora.find_spec", lambda name: None if name == "peft" else found(name)
    )
    plan = ghost("flux")
    with pytest.raises(IllegalPlan, match=r"peft is not installed.*diffkiln\[lora\]"):
        checked(plan, entry("transformer", (file, 1.0)))


def test_provenance_holds_the_digest_and_no_path(tmp_path):
    file = adapter(tmp_path / "a.safetensors", real("flux", "transformer"), "transformer")
    plan = ghost("flux")
    (item,) = checked(plan, entry("transformer", (file, 0.5)))
    (row,) = item.step.options()["adapters"]
    assert row["scale"] == 0.5
    assert row["digest"].startswith("sha256:")
    assert str(tmp_path) not in str(item.step.options())


def beside(plan, *listed: dict) -> list:
    """What each pass says of the rest of the spec."""
    steps = [item.step for item in placed(*listed)]
    ready = [step.prepare(Path(), getattr(diffusers, plan.class_name)) for step in steps]
    return [problem for step in ready for problem in step.check_beside(None, ready, "$.passes[0]")]


def test_tensors_for_a_text_encoder_that_no_pass_gives_to_it_are_refused(tmp_path):
    file = for_both(tmp_path / "both.safetensors", real("sd", "unet"), real("sd", "text_encoder"))
    alone = entry("unet", (file, 1.0))
    (problem,) = beside(ghost("sd"), alone)
    assert "tensors for text_encoder, such as lora_te_text_model_encoder_layers_0" in problem.reason
    assert '"ignore": ["lora_te_*"]' in problem.hint
    assert not beside(ghost("sd"), alone, entry("text_encoder", (file, 1.0)))
    ignored = {**alone, "adapters": [{**alone["adapters"][0], "ignore": ["lora_te_*"]}]}
    assert not beside(ghost("sd"), ignored)


def test_a_file_of_kohyas_for_both_is_fused_into_both(tmp_path):
    file = for_both(tmp_path / "both.safetensors", real("sd", "unet"), real("sd", "text_encoder"))
    for component in ("unet", "text_encoder"):
        _, found = both("sd", component, entry(component, (file, 0.5)))
        assert_same_weights(found, fused_by_diffusers("sd", component, (file, 0.5)))


def test_magnitudes_that_diffusers_leaves_out_are_refused(tmp_path):
    modules = real("sd", "unet"), real("sd", "text_encoder")
    file = for_both(tmp_path / "dora.safetensors", *modules, magnitudes=True)
    plan = ghost("sd")
    with pytest.raises(IllegalPlan, match=r"leaves out \d+ tensors of dora\.safetensors, such as .*dora_scale"):
        checked(plan, entry("unet", (file, 1.0)))
    ignored = {"file": str(file), "ignore": ["*dora_scale", "lora_te_*"]}
    assert checked(plan, {"name": "fuse_lora", "component": "unet", "adapters": [ignored]})


def test_an_adapter_times_zero_is_refused(tmp_path):
    with pytest.raises(SpecError, match="an adapter times 0 changes nothing"):
        placed(entry("unet", (tmp_path / "a.safetensors", 0)))


def test_a_layer_with_one_of_its_two_factors_is_refused(tmp_path):
    file = adapter(tmp_path / "half.safetensors", real("flux", "transformer"), "transformer")
    state = load_file(file)
    del state[next(key for key in state if "lora_B" in key)]
    save_file(state, file)
    with pytest.raises(IllegalPlan, match=r"have one of their two factors, such as"):
        checked(ghost("flux"), entry("transformer", (file, 1.0)))


REPO = {"file": "lora.safetensors", "repo": "owner/name", "revision": "0123456789abcdef" * 2 + "01234567"}


def test_an_adapter_on_the_hub_is_fetched_at_its_commit(tmp_path, monkeypatch):
    file = adapter(tmp_path / "lora.safetensors", real("flux", "transformer"), "transformer")
    asked = []

    def fetched(repo, name, *, revision):
        asked.append((repo, name, revision))
        return str(file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fetched)
    (item,) = checked(ghost("flux"), {"name": "fuse_lora", "component": "transformer", "adapters": [REPO]})
    assert asked == [("owner/name", name, REPO["revision"]) for name in ("lora.safetensors", "README.md")]
    (row,) = item.step.options()["adapters"]
    assert {key: row[key] for key in REPO} == REPO
    assert row["digest"].startswith("sha256:")


def test_an_adapter_that_the_hub_does_not_give_says_why():
    """The tests run with HF_HUB_OFFLINE: nothing is in the cache, and nothing may be fetched."""
    with pytest.raises(SourceError, match=r"owner/name at 0123456789ab cannot be had from the Hub"):
        checked(ghost("flux"), {"name": "fuse_lora", "component": "transformer", "adapters": [REPO]})


@pytest.mark.parametrize(("name", "shape"), [("lora_A", (2**22, 1)), ("lora_B", (1, 2**22))])
def test_an_adapter_of_four_million_ranks_is_refused_by_its_header(tmp_path, name, shape):
    """Before its layers are multiplied, which once took 7.8 GB."""
    path = tmp_path / "deep.safetensors"
    save_file({f"transformer.x.{name}.weight": torch.zeros(shape, dtype=torch.uint8)}, path)
    with pytest.raises(LimitExceeded, match="adapter_rank is 4,194,304, and 8,192 is allowed"):
        check_adapter(path)
