"""Adapters in slots: rows of a batch with their own, swaps, and what is refused."""

from __future__ import annotations

import threading
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import diffkiln
from diffkiln.bundle import open_bundle
from diffkiln.errors import CallError
from diffkiln.interpreter.quiet import quiet_libraries
from diffkiln.runtime.adapters.slots import count_for, slots_of
from diffkiln.runtime.adapters.targets import Room, rooms
from diffkiln.runtime.tables import Entry
from diffkiln.runtime.weights import Patch, WeightStore
from tests.pipelines import WARNING_FILTERS
from tests.runtime.adapters.conftest import CALL, changed, weights
from tests.runtime.adapters.files import adapter_of
from tests.simulated import Simulated

pytestmark = [
    *(pytest.mark.filterwarnings(text) for text in WARNING_FILTERS),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning:peft"),
]
PROMPTS = ["a fox", "an owl"]


@pytest.fixture(scope="session")
def roomy(eager, bundle, tmp_path_factory) -> Path:
    """The tiny FLUX with two slots a layer, for two prompts."""
    spec = {
        "spec_version": 1,
        "source": {"model": str(bundle.parent / "model")},
        "target": {"device": "cpu"},
        "inputs": CALL | {"batch_size": 2, "call": {"max_sequence_length": 32}},
        "passes": [{"name": "fuse_qkv", "component": "transformer"}],
        "runtime": {"adapters": {"rank": 4, "slots": 2, "exclude": ["proj_out"]}},
    }
    return diffkiln.compile(spec, tmp_path_factory.mktemp("slots") / "bundle").path


@pytest.fixture
def slots(roomy):
    with diffkiln.load(roomy) as loaded:
        yield loaded


@pytest.fixture
def line(eager, tmp_path) -> Path:
    return adapter_of(
        tmp_path / "line.safetensors", {"transformer": eager.transformer}, ("to_v", "linear"), seed=3, rank=2, alpha=3.0
    )


def drawn(pipe: Any, prompts: list[str] = PROMPTS, **more: Any) -> torch.Tensor:
    given = CALL | {"max_sequence_length": 32} | more
    generators = [torch.Generator().manual_seed(index) for index in range(len(prompts))]
    with quiet_libraries(), torch.inference_mode():
        return pipe(prompts, generator=generators, output_type="pt", **given).images


def test_mixes_give_what_diffusers_gives_and_leave_the_weights_alone(slots, eager, style, detail, line):
    plain, before = drawn(slots), weights(slots)
    files = {"style": style, "detail": detail, "line": line}
    mixes: list[dict[str, float]] = [{"style": 1}, {"style": 0.5, "detail": -1}, {"line": 1, "style": 0}, {}]
    try:
        for name, file in files.items():
            slots.load_lora(file, scale=0)
            with quiet_libraries():
                eager.load_lora_weights(file.parent, weight_name=file.name, adapter_name=name)
        eager.set_progress_bar_config(disable=True)
        found = []
        for mix in mixes:
            with quiet_libraries():
                eager.enable_lora() if mix else eager.disable_lora()
                if mix:
                    eager.set_adapters(list(mix), list(mix.values()))
            slots.set_adapters(mix)
            found.append(drawn(slots))
            assert float((found[-1] - drawn(eager)).abs().max()) < 1e-5, mix
    finally:
        with quiet_libraries():
            eager.unload_lora_weights()
    assert torch.equal(found[-1], plain)
    assert torch.equal(drawn(slots, adapters=mixes[1]), found[1]), "in, out, and in again: to the bit"
    assert all(".slot_" in name for name in changed(before, weights(slots)))
    for name in files:
        slots.unload_lora(name)
    assert not changed(before, weights(slots)) or all(
        ".slot_factors" in name for name in changed(before, weights(slots))
    )
    assert torch.equal(drawn(slots), plain)


def test_rows_have_adapters_of_their_own(slots, style, detail):
    for file in (style, detail):
        slots.load_lora(file, scale=0)
    rows = [{"style": 1.0}, {"style": -0.5, "detail": {"transformer.single_transformer_blocks": 0.5}}]
    mixed, plain = drawn(slots, adapters=rows), drawn(slots, adapters={})
    for index, mix in enumerate(rows):
        alone = drawn(slots, adapters=mix)[index]  # of fewer slots, whose sums have other bits
        assert float((mixed[index] - alone).abs().max()) < 1e-6
        assert not torch.equal(mixed[index], plain[index])
    assert torch.equal(drawn(slots, adapters=[{}, {"style": 1}])[0], plain[0])
    assert torch.equal(drawn(slots, adapters=[{"style": 1}, {"style": 1}]), drawn(slots, adapters={"style": 1}))


def test_within_a_limit_of_memory_groups_bring_their_slots(roomy, slots, style, detail):
    for file in (style, detail):
        slots.load_lora(file, scale=0)
    rows = [{"style": 1.0}, {"detail": 0.5}]
    whole = slots.executor.store.bytes_now
    with diffkiln.load(roomy, max_memory=int(0.95 * whole)) as small:
        plain = drawn(small)
        small.load_lora(style)
        small.load_lora(detail, scale=0)
        assert torch.equal(drawn(small, adapters=rows), drawn(slots, adapters=rows))
        assert torch.equal(drawn(small), drawn(slots, adapters={"style": 1}))
        small.unload_lora("style")
        assert torch.equal(drawn(small), plain)


def test_threads_with_different_adapters_swap_slots(slots, style, detail, line):
    for file in (style, detail, line):
        slots.load_lora(file, scale=0)
    mixes: list[Any] = [{"style": 1}, [{"detail": 1}, {"line": 1}], {"line": 0.5, "style": 0.5}, {}]
    alone = [drawn(slots, adapters=mix) for mix in mixes]
    found: list[list[torch.Tensor]] = [[] for _ in mixes]

    def call(index: int) -> None:
        found[index].extend(drawn(slots, adapters=mixes[index]) for _ in range(2))

    threads = [threading.Thread(target=call, args=(index,)) for index in range(len(mixes))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(len(images) == 2 for images in found)
    assert all(torch.equal(image, alone[index]) for index, images in enumerate(found) for image in images)


def test_a_swap_that_fails_is_mended_by_the_next_call(slots, style, monkeypatch):
    plain = drawn(slots)
    slots.load_lora(style, scale=0)
    store = slots.executor.store
    fill = store.fill

    def failing(*args: Any) -> None:
        monkeypatch.setattr(store, "fill", fill)
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(store, "fill", failing)
    with pytest.raises(diffkiln.errors.SystemRefused):
        slots.set_adapters({"style": 1})
    assert torch.equal(drawn(slots), plain)
    assert not torch.equal(drawn(slots, adapters={"style": 1}), plain)


def test_an_adapter_may_be_added_to_the_weights_beside_others_in_slots(slots, style, detail):
    plain = drawn(slots)
    slots.load_lora(style, merged=True, scale=0.5)
    slots.load_lora(detail, scale=0)
    merged = drawn(slots)
    slots.load_lora(style, name="again", scale=0)
    torch.testing.assert_close(merged, drawn(slots, adapters={"again": 0.5}), rtol=1e-5, atol=1e-5)
    rows = drawn(slots, adapters=[{"style": 0.5}, {"style": 0.5, "detail": 1}])
    assert torch.equal(rows[0], merged[0])
    assert not torch.equal(rows[1], merged[1])
    with pytest.raises(CallError, match="'style' was added to the weights, so all rows have it"):
        drawn(slots, adapters=[{"style": 0.5}, {}])
    slots.unload_lora("style")
    assert torch.equal(drawn(slots), plain)


def refused(pipe: Any, file: Path, words: str) -> None:
    before = weights(pipe)
    with pytest.raises(CallError, match=words):
        pipe.load_lora(file)
    assert not pipe.adapters
    assert not changed(before, weights(pipe))


def test_a_rank_above_the_slots_is_refused(slots, eager, tmp_path):
    file = adapter_of(tmp_path / "wide.safetensors", {"transformer": eager.transformer}, ("to_q",), rank=5)
    refused(slots, file, r'has the rank 5, of .*and the bundle\'s slots have 4.*"rank": 5.*merged=True')


def test_layers_without_slots_are_refused(slots, eager, tmp_path):
    parts = {"transformer": eager.transformer, "text_encoder": eager.text_encoder}
    file = adapter_of(tmp_path / "te.safetensors", parts, ("to_q", "q_proj"))
    refused(slots, file, r"q_proj of text_encoder, which te.safetensors changes, has no slots.*merged=True.*ignore")
    file = adapter_of(tmp_path / "out.safetensors", parts, ("proj_out",))
    refused(slots, file, r"proj_out of transformer, which out.safetensors changes, has no slots")


def test_additions_to_biases_and_other_architectures_are_refused(slots, style):
    table = load_file(style)
    layer = "transformer.transformer_blocks.0.attn.to_q"
    save_file(table | {f"{layer}.lora_B.bias": torch.zeros(table[f"{layer}.lora_B.weight"].shape[0])}, style)
    refused(slots, style, r"adds to the bias of .*to_q, for which slots have no room")
    wide = {f"{layer}.lora_A.weight": torch.zeros(4, 48), f"{layer}.lora_B.weight": torch.zeros(32, 4)}
    save_file(table | wide, style)
    refused(slots, style, r"would change 32 rows of \[48\].*another architecture")
    save_file(table | {f"{layer}.lora_A.weight": torch.full_like(table[f"{layer}.lora_A.weight"], float("nan"))}, style)
    refused(slots, style, "are not finite")


def test_mixes_that_do_not_fit_are_refused(slots, pipe, style, detail, line):
    assert (slots.adapter_slots, pipe.adapter_slots) == (2, 0)
    for file in (style, detail, line):
        slots.load_lora(file, scale=0)
    plain = drawn(slots)
    with pytest.raises(CallError, match=r"3 of them in one call, and the bundle has 2 slots"):
        drawn(slots, adapters=[{"style": 1}, {"detail": 1, "line": 1}])
    with pytest.raises(CallError, match=r"3 of them in one call, and the bundle has 2 slots"):
        slots.set_adapters({"style": 1, "detail": 1, "line": 1})
    assert slots.adapters == {"style": 0.0, "detail": 0.0, "line": 0.0}
    with pytest.raises(CallError, match="3 mixes for 2 prompts"):
        drawn(slots, adapters=[{}, {}, {"style": 1}])
    with pytest.raises(CallError, match="there is an adapter called 'style'"):
        slots.load_lora(style)
    assert torch.equal(drawn(slots), plain)
    pipe.load_lora(style, scale=0)
    with pytest.raises(CallError, match=r"a mix for each prompt needs slots.*\"slots\": 2"):
        drawn(pipe, ["a fox"], adapters=[{"style": 1}])


def test_the_bundle_as_diffusers_has_empty_slots(roomy, slots):
    with quiet_libraries():
        eager = diffkiln.load(roomy, as_diffusers=True)
        eager.set_progress_bar_config(disable=True)
    torch.testing.assert_close(drawn(eager), drawn(slots), rtol=1e-5, atol=1e-5)


def entry(*shape: int) -> Entry:
    return Entry(torch.float32, shape, 0, 4 * torch.Size(shape).numel())


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("down", (2, 3, 4)),
        ("down", (1, 2, 0, 5)),
        ("up", (7, 2, 4)),
        ("up", (7,)),
        ("factors", (8, 5)),
        ("factors", (6,)),
    ],
)
def test_tensors_that_do_not_fit_together_are_no_slots(name, shape):
    shapes = {"down": (1, 2, 3, 5), "up": (7, 2, 3), "factors": (8, 6)}
    assert rooms({f"a.slot_{key}": entry(*each) for key, each in shapes.items()}) == {"a": Room(1, 2, 3, 8)}
    assert not rooms({f"a.slot_{key}": entry(*each) for key, each in (shapes | {name: shape}).items()})
    assert not rooms({f"a.slot_{key}": entry(*each) for key, each in shapes.items() if key != name})


def test_a_call_s_names_decide_its_slots():
    names = [f"a{index}" for index in range(9)]
    for count in range(1, 5):
        for some in combinations(names, count):
            found = slots_of(some, count)
            assert sorted(found.values()) == list(range(count))
            assert found == slots_of(sorted(some, reverse=True), count)


@pytest.mark.parametrize("to", ["host", None], ids=["pinned", "resident"])
def test_slots_on_a_gpu_are_filled_wherever_its_weights_come_from(roomy, to):
    with open_bundle(roomy) as opened, opened.verify() as verified:
        device = Simulated()
        offload = None if to is None else {"use_stream": True, "to": to}
        store = WeightStore(verified, verified.manifest.weights, device.device, offload, on=device)
        layer = "transformer_blocks.0.attn.to_qkv"
        key = store.key_of("transformer", f"{layer}.slot_up")
        own = torch.ones(store.type_of("transformer", f"{layer}.slot_factors").shape)
        store.put(key, {f"{layer}.slot_factors": own})

        def now() -> tuple[torch.Tensor, torch.Tensor]:
            cursor = store.follow([key])
            tensors = cursor.enter(key)
            assert tensors[f"{layer}.slot_factors"] is own
            device.finish()
            found = tensors[f"{layer}.slot_up"].clone(), tensors[f"{layer}.weight"].clone()
            cursor.close()
            return found

        empty, other = now()
        assert not empty.any()

        def with_all(number: float) -> Patch:
            return Patch((f"{layer}.slot_up",), lambda held: held[f"{layer}.slot_up"][:, 0].fill_(number))

        store.fill({(key, "a"): with_all(2)})
        filled, still = now()
        assert (filled[:, 0] == 2).all()
        assert not filled[:, 1].any()
        assert torch.equal(still, other)
        store.patch({})
        assert torch.equal(now()[0], filled), "other changes of weights leave it"
        store.fill({(key, "a"): with_all(0)})
        assert not now()[0].any()
        store.close()


@pytest.mark.parametrize(
    ("used", "counts", "count"),
    [(0, [0, 1], 0), (1, [0, 1], 1), (2, [0, 1], 4), (1, [], 4), (2, [3, 2], 2), (3, [0, 5], 4)],
    ids=["none", "one", "no program for two", "no programs", "the smallest", "more than every layer has"],
)
def test_a_call_computes_the_fewest_slots_that_there_is_a_program_for(used, counts, count):
    assert count_for(used, counts, 4) == count
