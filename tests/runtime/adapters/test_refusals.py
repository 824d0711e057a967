"""Files that are refused, each with what to do about it, before any weight changes."""

from __future__ import annotations

import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

import diffkiln
from diffkiln.errors import CallError, LimitExceeded
from diffkiln.guards.limits import Limits
from diffkiln.interpreter.quiet import quiet_libraries
from tests.pipelines import FAMILIES, WARNING_FILTERS
from tests.runtime.adapters.conftest import CALL, changed, weights
from tests.runtime.adapters.files import adapter_of

pytestmark = [pytest.mark.filterwarnings(text) for text in WARNING_FILTERS]
LAYER = "transformer.transformer_blocks.0.attn.to_q"


def edited(file, **tensors):
    """The same file with other tensors; None takes one out."""
    table = load_file(file) | {key.replace("__", "."): tensor for key, tensor in tensors.items()}
    save_file({key: tensor for key, tensor in table.items() if tensor is not None}, file)
    return file


def refused(pipe, file, words, **more):
    before = weights(pipe)
    with pytest.raises(CallError, match=words):
        pipe.load_lora(file, **more)
    assert not pipe.adapters
    assert not changed(before, weights(pipe))


def test_another_architecture(pipe, tmp_path):
    unet = FAMILIES["sdxl"].build().unet
    file = adapter_of(tmp_path / "sdxl.safetensors", {"transformer": unet}, ("to_q",))
    refused(pipe, file, r"(\d+) of the \1 layers that sdxl.safetensors changes are not in the bundle.*another archit")


def test_another_width(pipe, style):
    wide = {f"{LAYER}.lora_A.weight": torch.zeros(4, 48), f"{LAYER}.lora_B.weight": torch.zeros(32, 4)}
    refused(pipe, edited(style, **wide), r"would change 32 rows of \[48\].*another architecture")


def test_rows_that_the_fused_matrix_does_not_have(pipe, style):
    tall = {f"{LAYER}.lora_B.weight": torch.zeros(97, 4)}
    refused(pipe, edited(style, **tall), r"would change 97 rows")


def test_a_layer_that_the_bundle_lacks(pipe, style):
    gone = "transformer.transformer_blocks.7.attn.to_q"
    more = {f"{gone}.lora_A.weight": torch.zeros(4, 32), f"{gone}.lora_B.weight": torch.zeros(32, 4)}
    refused(pipe, edited(style, **more), r"1 of the \d+ layers.*transformer_blocks.7.attn.to_q. Passes removed them")
    pipe.load_lora(style, ignore=["*_blocks.7.*"])


def test_half_of_the_keys_unknown(pipe, style):
    keys = {f"transformer.x{index}.weight": torch.zeros(2) for index in range(3)}
    refused(pipe, edited(style, **keys), r"3 of the \d+ tensors .*such as transformer.x0.weight.*lora convert FILE")
    pipe.load_lora(style, ignore="transformer.x*")


@pytest.mark.parametrize(
    ("key", "method"),
    [
        ("transformer.a.lora_magnitude_vector", "DoRA"),
        ("lora_unet_a.dora_scale", "DoRA"),
        ("lycoris_a.lokr_w1", "LoKr"),
        ("lora_unet_a.hada_w1_a", "LoHa"),
    ],
)
def test_other_methods_are_named(pipe, style, key, method):
    refused(pipe, edited(style, **{key: torch.ones(3)}), rf"1 of the \d+ tensors .* of {method}, which is not LoRA")


def test_dora_in_the_configuration(pipe, style):
    table = load_file(style)
    save_file(table, style, metadata={"lora_adapter_metadata": '{"transformer.use_dora": true}'})
    refused(pipe, style, "is an adapter of DoRA.*fuse_lora")


@pytest.mark.parametrize("text", ["[1]", "{", '{"transformer.lora_alpha": "4"}', '{"transformer.lora_alpha": 1e999}'])
def test_a_broken_configuration(pipe, style, text):
    save_file(load_file(style), style, metadata={"lora_adapter_metadata": text})
    refused(pipe, style, "Save the adapter again")


def test_one_factor_of_two(pipe, style):
    refused(pipe, edited(style, **{f"{LAYER}.lora_B.weight": None}), "one of the two factors.*get it again")


def test_a_layer_that_is_named_twice(pipe, style):
    table = load_file(style)
    more = {f"{LAYER}.lora_down.weight": table[f"{LAYER}.lora_A.weight"]}
    refused(pipe, edited(style, **more), "names one layer twice")


def test_numbers_that_are_not_finite(pipe, style):
    up = load_file(style)[f"{LAYER}.lora_B.weight"]
    up[0, 0] = torch.nan
    refused(pipe, edited(style, **{f"{LAYER}.lora_B.weight": up}), r"1 of 128 numbers of .*to_q.lora_B.weight are not")


def test_whole_numbers_are_no_factors(pipe, style):
    refused(pipe, edited(style, **{f"{LAYER}.lora_B.weight": torch.ones(32, 4, dtype=torch.int8)}), "torch.int8")


@pytest.mark.parametrize("name", ["style.bin", "style.safetensors"])
def test_a_pickle_is_not_read(pipe, tmp_path, name):
    file = tmp_path / name
    file.write_bytes(pickle.dumps({"x": 1}) if name.endswith("bin") else b"PK\x03\x04" + bytes(100))
    refused(pipe, file, "is a pickle, which can run code")


@pytest.mark.parametrize("content", [b"", b"1234567", b"\xff" * 64, b"\x02" + bytes(7) + b"[]"])
def test_what_is_no_safetensors_file(pipe, tmp_path, content):
    file = tmp_path / "style.safetensors"
    file.write_bytes(content)
    refused(pipe, file, "no safetensors file")


def test_what_is_no_file(pipe, tmp_path):
    refused(pipe, tmp_path, "is not a file")
    refused(pipe, tmp_path / "nothing.safetensors", "cannot be read: No such file")
    refused(pipe, 7, "give the path of a safetensors file")


def test_a_component_that_the_bundle_lacks(pipe, style):
    refused(pipe, style, "'unet' is none of", component="unet")
    table = load_file(style)
    save_file({key.replace("transformer.", "lora_te3_", 1): tensor for key, tensor in table.items()}, style)
    refused(pipe, style, "lora_te3_|text_encoder_3")


def test_limits_hold_before_anything_is_read(bundle, style):
    with diffkiln.load(bundle, limits=Limits(adapter_rank=2)) as pipe, pytest.raises(LimitExceeded, match="rank is 4"):
        pipe.load_lora(style)
    with diffkiln.load(bundle, limits=Limits(adapter_bytes=99)) as pipe, pytest.raises(LimitExceeded, match="bytes"):
        pipe.load_lora(style)


@pytest.mark.parametrize("given", [{"name": ""}, {"name": "a\nb"}, {"ignore": [1]}, {"scale": None}])
def test_arguments_of_other_kinds(pipe, style, given):
    refused(pipe, style, "load_lora|adapters", **given)


@pytest.mark.parametrize("address", ["hf://me/a@main/x.safetensors", "hf://me/a@" + "0" * 40 + "/x.bin", "hf://x"])
def test_an_address_on_the_hub_is_exact(pipe, address):
    with pytest.raises(diffkiln.errors.HubError):
        pipe.load_lora(address)


@pytest.fixture(scope="module")
def pruned(eager, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pruned")
    eager.save_pretrained(folder / "model", safe_serialization=True)
    spec = {
        "spec_version": 1,
        "source": {"model": str(folder / "model")},
        "target": {"device": "cpu"},
        "inputs": CALL | {"call": {"max_sequence_length": 32}},
        "passes": [{"name": "prune", "component": "transformer", "blocks": ["transformer_blocks.0"]}],
    }
    return diffkiln.compile(spec, folder / "bundle").path


def test_blocks_that_have_moved_up(pruned, style, eager, tmp_path):
    """Block 1 is block 0 by now: an adapter of block 0 would be added to it."""
    with diffkiln.load(pruned) as pipe:
        refused(pipe, style, "Passes removed them|the pass prune changed the layers of transformer: blocks after")
        table = {key: tensor for key, tensor in load_file(style).items() if ".transformer_blocks.0." in f".{key}"}
        save_file(table, style)
        refused(pipe, style, r"the pass prune changed the layers of transformer: blocks after.*fuse_lora")
        encoder = adapter_of(tmp_path / "te.safetensors", {"text_encoder": eager.text_encoder}, ("q_proj",))
        pipe.load_lora(encoder)
    with quiet_libraries():
        whole = diffkiln.load(pruned, as_diffusers=True)
        with pytest.raises(CallError, match=r"the pass prune gave layers of transformer other names.*fuse_lora"):
            whole.load_lora_weights(style.parent, weight_name=style.name)


def test_a_component_of_the_first_of_several_processes(pipe, eager, tmp_path, monkeypatch):
    """The others hold no weights that could be changed, and a LoRA is for all or for none."""
    monkeypatch.setitem(pipe.bundle.manifest.runtime, "first", ["text_encoder"])
    encoder = adapter_of(tmp_path / "te.safetensors", {"text_encoder": eager.text_encoder}, ("q_proj",))
    refused(pipe, encoder, "the first of several processes alone holds text_encoder, and te.safetensors changes it")


def test_as_diffusers_never_leaves_out_what_was_fused(bundle, eager, style, tmp_path):
    """diffusers would add what it finds, proj_mlp, and say nothing of the projections."""
    with quiet_libraries():
        pipe = diffkiln.load(bundle, as_diffusers=True)
        with pytest.raises(CallError, match=r"8 of the 10 layers .*attn.to_q: passes fused or removed.*its load_lora"):
            pipe.load_lora_weights(style.parent, weight_name=style.name)
        fits = adapter_of(tmp_path / "fits.safetensors", {"transformer": eager.transformer}, ("to_out.0", "proj_mlp"))
        pipe.load_lora_weights(fits.parent, weight_name=fits.name)
    assert pipe.get_active_adapters() == ["default_0"]
