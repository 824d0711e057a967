"""load_lora, set_adapters and unload_lora: what they change in the weights, and what they leave."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import diffkiln
from diffkiln.errors import CallError
from diffkiln.runtime.adapters.scales import PerBlock, scale_of
from tests.pipelines import WARNING_FILTERS
from tests.runtime.adapters.conftest import CALL, changed, weights

pytestmark = [pytest.mark.filterwarnings(text) for text in WARNING_FILTERS]
BLOCK = "transformer_blocks.0.attn"


def drawn(pipe, **more) -> torch.Tensor:
    given = CALL | {"max_sequence_length": 32} | more
    return pipe("a fox", generator=torch.Generator().manual_seed(1), output_type="pt", **given).images


def test_the_sum_lies_in_the_rows_of_the_fused_matrix(pipe, style, eager):
    before = weights(pipe)
    assert pipe.load_lora(style, scale=0.5) == "style"
    after = weights(pipe)
    name = f"transformer.{BLOCK}.to_qkv.weight"
    file = load_file(style)
    rows = eager.transformer.get_submodule(BLOCK).to_q.weight.shape[0]
    for index, part in enumerate(("to_q", "to_k", "to_v")):
        down, up = (file.get(f"transformer.{BLOCK}.{part}.lora_{factor}.weight") for factor in "AB")
        wanted = before[name][index * rows : (index + 1) * rows]
        wanted = wanted if down is None else wanted + 0.5 * up @ down
        torch.testing.assert_close(after[name][index * rows : (index + 1) * rows], wanted, rtol=1e-6, atol=1e-6)
    assert all(key.endswith(("to_qkv.weight", "proj_mlp.weight")) for key in changed(before, after))


def test_addresses_stay_and_rollback_is_exact(pipe, style, detail):
    before = weights(pipe)
    places = {key: [t.data_ptr() for t in pipe.executor.store.get(key).values()] for key in pipe.executor.store.groups}
    pipe.load_lora(style)
    once = weights(pipe)
    pipe.load_lora(detail, scale=-1)
    both = weights(pipe)
    assert pipe.adapters == {"style": 1.0, "detail": -1.0}
    pipe.set_adapters({"style": 1})
    assert not changed(once, weights(pipe))
    pipe.set_adapters({"detail": -1, "style": 1})
    assert not changed(both, weights(pipe)), "whatever the order in the mix"
    pipe.unload_lora("style")
    pipe.unload_lora("detail")
    assert not changed(before, weights(pipe))
    assert not pipe.adapters
    assert places == {
        key: [t.data_ptr() for t in pipe.executor.store.get(key).values()] for key in pipe.executor.store.groups
    }


def test_a_call_may_have_adapters_of_its_own(pipe, style, detail):
    plain = drawn(pipe)
    pipe.load_lora(style)
    pipe.load_lora(detail, scale=0)
    styled = drawn(pipe)
    assert not torch.equal(styled, plain)
    assert torch.equal(drawn(pipe, adapters={}), plain)
    assert not torch.equal(drawn(pipe, adapters={"detail": 1}), styled)
    assert torch.equal(drawn(pipe), styled)


def test_a_call_that_was_refused_leaves_the_mix(pipe, style):
    pipe.load_lora(style)
    styled = drawn(pipe)
    with pytest.raises(CallError, match=r'stile. is not loaded; loaded are: style\. Did you mean "style"'):
        drawn(pipe, adapters={"stile": 1})
    assert torch.equal(drawn(pipe), styled)


def test_a_file_that_cannot_be_read_midway_is_mended_by_the_next_call(pipe, style, detail, monkeypatch):
    plain = drawn(pipe)
    pipe.load_lora(style, scale=0)
    store = pipe.executor.store
    restore, calls = store._restore, []

    def failing(*args):
        calls.append(args)
        if len(calls) == 2:
            raise OSError(5, "Input/output error")
        restore(*args)

    monkeypatch.setattr(store, "_restore", failing)
    with pytest.raises(diffkiln.errors.SystemRefused):
        pipe.set_adapters({"style": 1})
    assert torch.equal(drawn(pipe), plain)


def test_threads_with_different_adapters_get_their_own(pipe, style, detail):
    pipe.load_lora(style, scale=0)
    pipe.load_lora(detail, scale=0)
    mixes = [{"style": 1}, {"detail": 1}, {"style": 0.5, "detail": 0.5}, {}]
    alone = [drawn(pipe, adapters=mix) for mix in mixes]
    found: list[list[torch.Tensor]] = [[] for _ in mixes]

    def call(index: int) -> None:
        for _ in range(2):
            found[index].append(drawn(pipe, adapters=mixes[index]))

    threads = [threading.Thread(target=call, args=(index,)) for index in range(len(mixes))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(len(images) == 2 for images in found)
    assert all(torch.equal(image, alone[index]) for index, images in enumerate(found) for image in images)


def test_within_a_call_nothing_changes(pipe, style):
    pipe.load_lora(style)

    def swap(pipe, step, timestep, values):
        pipe.set_adapters({})

    with pytest.raises(CallError, match="within its own call"):
        drawn(pipe, callback_on_step_end=swap)


@pytest.mark.parametrize(
    ("mix", "words"),
    [
        ({"style": float("nan")}, "is no number"),
        ({"style": True}, "is no number"),
        ({"style": "1"}, "is no number"),
        ({"style": 1000}, "100 is the most"),
        (["style"], "give names and scales"),
        ({"style": {}}, "are no numbers by block"),
        ({"style": {3: 1.0}}, "are no numbers by block"),
        ({"style": {"transformer": "1"}}, "'style' in transformer is no number"),
        ({"style": {"transformer.transformer_block": 1.0}}, r'Did you mean "transformer.transformer_blocks"'),
    ],
)
def test_a_mix_is_names_and_numbers(pipe, style, mix, words):
    pipe.load_lora(style)
    with pytest.raises(CallError, match=words):
        pipe.set_adapters(mix)
    assert pipe.adapters == {"style": 1.0}


def test_the_longest_beginning_of_a_layer_s_name_counts():
    scale = PerBlock((("a.blocks", 0.5), ("a.blocks.1", 0.0), ("b", 2.0)))
    layers = ("a.blocks.0.to_q", "a.blocks.1.to_q", "a.blocks.10.to_q", "b.to_q", "c.to_q")
    assert [scale_of(scale, layer) for layer in layers] == [0.5, 0.0, 0.5, 2.0, 1.0]


def test_a_block_that_is_turned_off_keeps_its_bits_and_is_told_as_it_was_given(pipe, style):
    before = weights(pipe)
    pipe.load_lora(style, scale={"transformer": 0})
    assert not changed(before, weights(pipe))
    assert pipe.adapters == {"style": {"transformer": 0.0}}
    pipe.set_adapters({"style": {"transformer.transformer_blocks": 0}})
    assert changed(before, weights(pipe))
    assert not any(".transformer_blocks." in key for key in changed(before, weights(pipe)))
    pipe.set_adapters({"style": {"transformer": 0.5}})
    half = weights(pipe)
    pipe.set_adapters({"style": 0.5})
    assert not changed(half, weights(pipe))


def test_two_adapters_of_one_name_are_refused(pipe, style, detail):
    pipe.load_lora(style, name="a")
    with pytest.raises(CallError, match=r"there is an adapter called 'a'.*unload_lora"):
        pipe.load_lora(detail, name="a")
    assert pipe.adapters == {"a": 1.0}


def test_an_adapter_of_a_text_encoder_and_of_layers_that_nothing_reads(pipe, eager, tmp_path):
    from tests.runtime.adapters.files import adapter_of

    before = weights(pipe)
    file = adapter_of(tmp_path / "te.safetensors", {"text_encoder": eager.text_encoder}, ("q_proj", "fc1"))
    pipe.load_lora(file)
    touched = changed(before, weights(pipe))
    assert touched
    assert all(name.startswith("text_encoder.") for name in touched)


def renamed(file: Path, change) -> Path:
    out = file.with_name("renamed.safetensors")
    save_file({change(key): tensor for key, tensor in load_file(file).items()}, out)
    return out


@pytest.mark.parametrize(
    "change",
    [
        lambda key: "base_model.model." + key.removeprefix("transformer."),
        lambda key: key.removeprefix("transformer.").replace(".lora_A.", ".lora_A.default."),
        lambda key: key.replace("lora_A", "lora_down").replace("lora_B", "lora_up"),
        lambda key: key.replace("lora_A", "lora.down").replace("lora_B", "lora.up"),
        lambda key: (
            "lora_transformer_" + key.removeprefix("transformer.").rsplit(".", 2)[0].replace(".", "_")
            + (".lora_down.weight" if "lora_A" in key else ".lora_up.weight")
        ),
    ],
    ids=["peft", "peft-named", "kohya-dotted", "diffusers-old", "underscored"],
)  # fmt: skip
def test_formats_say_the_same(pipe, style, change):
    pipe.load_lora(style, name="a")
    wanted = weights(pipe)
    pipe.unload_lora("a")
    pipe.load_lora(renamed(style, change), name="a")
    assert not changed(wanted, weights(pipe))


def test_alphas_are_divided_by_the_rank(pipe, style):
    pipe.load_lora(style, name="a", scale=0.5)
    wanted = weights(pipe)
    pipe.unload_lora("a")
    table = load_file(style)
    layers = {key.rsplit(".", 2)[0] for key in table}
    save_file(table | {f"{layer}.alpha": torch.tensor(2.0) for layer in layers}, style)  # of rank 4
    pipe.load_lora(style, name="a")
    assert not changed(wanted, weights(pipe))
