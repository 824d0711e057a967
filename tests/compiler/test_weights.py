"""Components that are streamed a few blocks at a time: the same bundle, with a few blocks in memory."""

from __future__ import annotations

import copy
import gc
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import diffkiln
from diffkiln.bundle import open_bundle
from diffkiln.compiler import weights as streaming
from diffkiln.compiler.verify import call as calls
from diffkiln.errors import BuildError, PassError
from diffkiln.models.shards import Shards
from diffkiln.models.weights import weights_of
from diffkiln.passes.model.prune import Prune
from diffkiln.passes.model.quantize import Quantize
from tests.compiler.test_packing import digits
from tests.conftest import DIGITS
from tests.passes.adapters import adapter
from tests.pipelines import WARNING_FILTERS

pytestmark = [pytest.mark.filterwarnings(text) for text in WARNING_FILTERS]


def entry(name: str, component: str = "transformer", **options: Any) -> dict[str, Any]:
    return {"name": name, "component": component, **options}


#: Passes that change names, drop blocks, and store weights in other forms; of three components.
MANY = [
    entry("fuse_qkv"),
    entry("prune", blocks=["single_transformer_blocks.0"]),
    entry("quantize", backend="bitsandbytes", type="nf4", include=["single_transformer_blocks.*"]),
    entry("quantize", type="int8_weight_only"),
    entry("quantize", "text_encoder_2", backend="quanto", type="int8"),
    entry("layerwise_cast", "vae"),
    entry("channels_last", "vae"),
]


@pytest.fixture
def loads(monkeypatch) -> list[tuple[str, list[str]]]:
    """Everything is streamed, a block at a time; gives what is loaded."""
    seen: list[tuple[str, list[str]]] = []
    load = Shards.load

    def noted(self, units):
        seen.append((self.name, list(units)))
        return load(self, units)

    monkeypatch.setattr(Shards, "load", noted)
    monkeypatch.setattr(streaming, "WHOLE_UP_TO", 0)
    monkeypatch.setattr(streaming, "SHARD", 0)
    return seen


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    root = tmp_path_factory.mktemp("whole")
    return diffkiln.compile(digits(passes=MANY, runtime=TOGETHER), root / "bundle", base=DIGITS)


TOGETHER = {"offload": {"num_blocks_per_group": 2, "use_stream": False}}


def test_the_bundle_is_the_same_whether_streamed_or_not(whole, loads, tmp_path):
    """Also where the blocks of one file come in several portions."""
    streamed = diffkiln.compile(digits(passes=MANY, runtime=TOGETHER), tmp_path / "bundle", base=DIGITS)
    assert streamed.id == whole.id
    assert not [notice for notice in streamed.notices if "loaded whole" in notice]
    assert {name for name, _ in loads} == {"text_encoder", "text_encoder_2", "transformer", "vae"}
    assert all(len(units) == 1 for _, units in loads), "each portion is a block, or what lies outside of them"
    blocks = [units[0] for name, units in loads if name == "transformer"]
    assert len(blocks) == len(set(blocks))
    assert "single_transformer_blocks.0" not in blocks, "what is pruned is not read"


def test_large_components_are_verified_with_the_blocks_of_a_twin(loads, tmp_path, monkeypatch):
    """They come first, so that they need not wait for the others."""
    sizes = diffkiln.check(digits(), base=DIGITS).bytes_after
    assert sizes["transformer"] == max(sizes.values())
    monkeypatch.setattr(calls, "WHOLE_UP_TO", sizes["transformer"] - 1)
    verified: list[tuple[str, set[str]]] = []
    check = calls.Verification.check_component

    def noted(self, name, module):
        verified.append((name, {key.partition(".weight")[0] for key, t in weights_of(module) if not t.is_meta}))
        return check(self, name, module)

    monkeypatch.setattr(calls.Verification, "check_component", noted)
    diffkiln.compile(digits(), tmp_path / "bundle", base=DIGITS)
    real = dict(verified)["transformer"]
    assert any(name.startswith("transformer_blocks.0.") for name in real)
    assert any(name.startswith("single_transformer_blocks.0.") for name in real)
    assert not any(name.startswith("single_transformer_blocks.1.") for name in real)
    order = [units[0] for name, units in loads if name == "transformer"]
    assert order[:3] == ["", "transformer_blocks.0", "single_transformer_blocks.0"]


def test_a_pass_that_needs_all_weights_has_them_and_it_is_told(loads, tmp_path):
    checked = diffkiln.check(digits(), base=DIGITS)
    adapter(tmp_path / "adapter.safetensors", checked.state.modules["transformer"], "transformer", ending="to_k")
    passes = [entry("fuse_lora", adapters=[{"file": str(tmp_path / "adapter.safetensors")}])]
    built = diffkiln.compile(digits(passes=passes), tmp_path / "bundle", base=DIGITS)
    assert "transformer" not in {name for name, _ in loads}
    (told,) = [notice for notice in built.notices if "loaded whole" in notice]
    assert told.startswith("transformer is loaded whole, 0.0 GB: fuse_lora adds adapters")


def test_room_is_asked_for_what_the_files_of_weights_hold(whole):
    """Nothing is written beside them: a portion goes straight into the bundle."""
    checked = diffkiln.check(digits(passes=MANY), base=DIGITS)
    with open_bundle(whole.path) as bundle:
        rows = [row for groups in bundle.manifest.weights.values() for row in groups]
    assert sum(row.bytes for row in rows) == sum(checked.bytes_after.values())


def test_a_block_that_is_not_finite_is_found_in_its_portion(loads, tmp_path, monkeypatch):
    read = Shards._read

    def damaged(self, key, dtype):
        tensor = read(self, key, dtype)
        return tensor.fill_(float("nan")) if key == "single_transformer_blocks.1.norm.linear.bias" else tensor

    monkeypatch.setattr(Shards, "_read", damaged)
    with pytest.raises(BuildError, match=r"component transformer: .* of single_transformer_blocks\.1\.norm\.linear"):
        diffkiln.compile(digits(), tmp_path / "bundle", base=DIGITS)
    assert list(tmp_path.iterdir()) == []


def test_a_pass_that_takes_the_data_from_a_weight_is_caught(loads, tmp_path, monkeypatch):
    """Such as one that asks whether any weight is a ghost, and so does nothing on a portion."""
    apply = Quantize.apply

    def careless(self, module):
        notes = apply(self, module)
        module.x_embedder.bias = torch.nn.Parameter(module.x_embedder.bias.to("meta"), requires_grad=False)
        return notes

    monkeypatch.setattr(Quantize, "apply", careless)
    with pytest.raises(PassError, match=r"component transformer: the passes left the weight x_embedder\.bias without"):
        diffkiln.compile(digits(passes=[entry("quantize", type="int8_weight_only")]), tmp_path / "bundle", base=DIGITS)


def test_a_pass_that_puts_other_blocks_in_has_all_weights(loads, tmp_path, monkeypatch):
    """Nobody could say which weights of the checkpoint they need."""
    apply = Prune.apply

    def replacing(self, module):
        notes = apply(self, module)
        module.single_transformer_blocks[0] = copy.deepcopy(module.single_transformer_blocks[0])
        return notes

    monkeypatch.setattr(Prune, "apply", replacing)
    passes = [entry("prune", blocks=["single_transformer_blocks.1"])]
    built = diffkiln.compile(digits(passes=passes), tmp_path / "bundle", base=DIGITS)
    assert any("transformer is loaded whole" in notice for notice in built.notices)


def test_old_blocks_live_until_new_ones_are_compared_with_them(monkeypatch):
    """Otherwise a new one could lie where an old one did, and be taken for it."""

    class Block(torch.nn.Module):
        pass

    class Blocks(torch.nn.Module):
        _repeated_blocks = ("Block",)

        def __init__(self):
            super().__init__()
            self.all = torch.nn.ModuleList([Block(), Block()])

    def replacing(module, name, placed):
        pruned = weakref.ref(module.all[1])
        del module.all[1]
        module.all[0] = Block()
        gc.collect()
        assert pruned() is not None

    monkeypatch.setattr(streaming.manager, "apply", replacing)
    assert not streaming._origins(SimpleNamespace(module=Blocks(), name="model"), SimpleNamespace(listed=[]))
