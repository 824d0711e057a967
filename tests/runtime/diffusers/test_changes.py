"""What is changed inside of compiled blocks after loading: it runs as in diffusers, or is refused. Never ignored."""

from __future__ import annotations

import copy
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import diffkiln
from diffkiln.errors import CallError
from diffkiln.interpreter.quiet import quiet_libraries
from diffkiln.runtime.changes import Watch
from diffkiln.runtime.engine_blocks import EngineBlock
from tests.conftest import DIGITS
from tests.exporters.regions import engine_cache
from tests.pipelines import WARNING_FILTERS

pytestmark = [
    *(pytest.mark.filterwarnings(text) for text in WARNING_FILTERS),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
CALL = {"height": 32, "width": 32, "num_inference_steps": 2, "guidance_scale": 1.0, "max_sequence_length": 16}


def image(pipe: Any, **changed: Any) -> np.ndarray:
    generator = torch.Generator("cpu").manual_seed(7)
    with quiet_libraries():
        return pipe("a handwritten seven", generator=generator, output_type="np", **CALL | changed).images


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("changes")


def bundle_of(room: Path, **runtime: Any) -> Path:
    """Compiled by blocks, its projections as diffusers has them."""
    name = "-".join(runtime) or "plain"
    if not (room / name).exists():
        spec = json.loads((DIGITS / "spec.json").read_text())
        spec |= {
            "inputs": spec["inputs"] | {"num_inference_steps": 2},
            "runtime": runtime,
            "passes": spec["passes"][1:],
        }
        diffkiln.compile(spec, room / name, base=DIGITS, cache=engine_cache())
    return room / name


def loaded(bundle: Path) -> Any:
    with quiet_libraries():
        pipe = diffkiln.load(bundle, as_diffusers=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def strict(room: Path) -> Any:
    return loaded(bundle_of(room))


@pytest.fixture
def lenient(room: Path) -> Any:
    return loaded(bundle_of(room, on_incompatible="eager"))


@pytest.fixture
def original() -> Any:
    from diffusers import FluxPipeline

    with quiet_libraries():
        pipe = FluxPipeline.from_pretrained(DIGITS / "model", local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def adapter(room: Path) -> Path:
    """A LoRA of two layers within the first block."""
    from safetensors.torch import save_file

    drawn = torch.Generator().manual_seed(1)
    weights = {}
    for layer in ("attn.to_q", "attn.to_out.0"):
        path = f"transformer.transformer_blocks.0.{layer}"
        weights[f"{path}.lora_A.weight"] = torch.randn(4, 96, generator=drawn)
        weights[f"{path}.lora_B.weight"] = torch.randn(96, 4, generator=drawn)
    folder = room / "adapter"
    folder.mkdir()
    save_file(weights, folder / "pytorch_lora_weights.safetensors")
    return folder


def _block(pipe: Any) -> Any:
    return pipe.transformer.transformer_blocks[0]


def _lora(pipe: Any, adapter: Path) -> None:
    pipe.load_lora_weights(adapter, adapter_name="a")


def _scaled_lora(pipe: Any, adapter: Path) -> None:
    _lora(pipe, adapter)
    pipe.set_adapters(["a"], adapter_weights=[0.3])


class Doubling:
    """An attention processor that is another one, doubled."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        found = self._inner(*args, **kwargs)
        return tuple(2 * item for item in found) if isinstance(found, tuple) else 2 * found


def _processors(pipe: Any, _adapter: Path) -> None:
    processors = pipe.transformer.attn_processors
    pipe.transformer.set_attn_processor({name: Doubling(item) for name, item in processors.items()})


def _hook(pipe: Any, _adapter: Path) -> None:
    _block(pipe).attn.to_v.register_forward_hook(lambda _module, _args, result: result * 2)


def _pre_hook(pipe: Any, _adapter: Path) -> None:
    _block(pipe).ff.register_forward_pre_hook(lambda _module, args: tuple(item * 2 for item in args))


def _layer(pipe: Any, _adapter: Path) -> None:
    old = _block(pipe).attn.to_k
    made = torch.nn.Linear(old.in_features, old.out_features)
    with torch.no_grad():
        made.weight.copy_(old.weight * 2)
        made.bias.copy_(old.bias)
    _block(pipe).attn.to_k = made


def _number(pipe: Any, _adapter: Path) -> None:
    _block(pipe).norm2.eps = 0.5


def _function(pipe: Any, _adapter: Path) -> None:
    ff = _block(pipe).ff
    inner = ff.forward
    ff.forward = lambda *args, **kwargs: inner(*args, **kwargs) * 2


CHANGES = {
    "load_lora_weights": (_lora, r"to_q"),
    "set_adapters": (_scaled_lora, r"to_q"),
    "set_attn_processor": (_processors, r"attn\.processor was changed"),
    "forward hook": (_hook, r"attn\.to_v has other forward hooks"),
    "forward pre-hook": (_pre_hook, r"ff has other forward hooks"),
    "replaced layer": (_layer, r"attn\.to_k|attn.*was changed"),
    "a number": (_number, r"norm2\.eps was changed"),
    "a function": (_function, r"ff\.forward was changed"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_change_within_a_compiled_block_is_refused_and_names_the_way(name: str, strict: Any, adapter: Path) -> None:
    change, message = CHANGES[name]
    image(strict)
    change(strict, adapter)
    with pytest.raises(CallError, match=rf"(?s)transformer_blocks\.0: .*{message}.*fuse_lora.*on_incompatible"):
        image(strict)


@pytest.mark.parametrize("name", CHANGES)
def test_change_within_a_compiled_block_runs_as_in_diffusers_where_the_spec_says_eager(
    name: str, lenient: Any, original: Any, adapter: Path
) -> None:
    plain = image(original)
    np.testing.assert_allclose(image(lenient), plain, atol=1e-5)
    for pipe in (lenient, original):
        CHANGES[name][0](pipe, adapter)
    want = image(original)
    assert np.abs(want - plain).max() > 1e-4
    np.testing.assert_allclose(image(lenient), want, atol=1e-5)


@pytest.mark.parametrize("pipe", ["strict", "lenient"])
def test_new_numbers_in_weights_need_nothing(pipe: str, original: Any, request: pytest.FixtureRequest) -> None:
    """Engines read weights at each call: written in place, or in a new parameter."""
    compiled = request.getfixturevalue(pipe)
    for each in (compiled, original):
        with torch.no_grad():
            _block(each).attn.to_q.weight.mul_(3)
            _block(each).attn.to_k.weight.data *= 2
            layer = _block(each).attn.to_v
            layer.weight = torch.nn.Parameter(layer.weight * 2, requires_grad=False)
    np.testing.assert_allclose(image(compiled), image(original), atol=1e-5)


def test_adapter_that_is_fused_and_unloaded_is_in_the_weights_which_engines_read(
    strict: Any, original: Any, adapter: Path
) -> None:
    for pipe in (strict, original):
        _lora(pipe, adapter)
        pipe.fuse_lora()
        pipe.unload_lora_weights()
    np.testing.assert_allclose(image(strict), image(original), atol=1e-5)


def test_what_is_undone_is_no_change(strict: Any, adapter: Path) -> None:
    want = image(strict)
    handle = _block(strict).attn.to_v.register_forward_hook(lambda *_: None)
    with pytest.raises(CallError):
        image(strict)
    handle.remove()
    _lora(strict, adapter)
    strict.unload_lora_weights()
    np.testing.assert_allclose(image(strict), want, atol=1e-6)


def test_processor_of_the_same_kind_and_hooks_around_a_block_are_no_change(strict: Any) -> None:
    want, seen = image(strict), []
    attention = _block(strict).attn
    attention.processor = type(attention.processor)()
    _block(strict).register_forward_hook(lambda *_: seen.append(1))
    np.testing.assert_array_equal(image(strict), want)
    assert len(seen) == CALL["num_inference_steps"]


def test_copy_of_a_compiled_block_is_refused(strict: Any) -> None:
    """It would look up the weights of the first one."""
    with pytest.raises(CallError, match="cannot be copied or saved"):
        copy.deepcopy(strict.transformer)


@pytest.mark.parametrize("eager", [False, True])
def test_adapter_with_offloading_to_disk(eager: bool, room: Path, original: Any, adapter: Path) -> None:
    offload = {"strategy": "group", "type": "block_level", "num_blocks_per_group": 1}
    more = {"on_incompatible": "eager"} if eager else {}
    pipe = loaded(bundle_of(room, offload=offload, **more))
    np.testing.assert_allclose(image(pipe), image(original), atol=1e-5)
    _lora(pipe, adapter)
    _lora(original, adapter)
    if eager:
        np.testing.assert_allclose(image(pipe), image(original), atol=1e-5)
    else:
        with pytest.raises(CallError, match="fuse_lora"):
            image(pipe)


def test_adapter_that_is_fused_with_offloading_to_disk(room: Path, original: Any, adapter: Path) -> None:
    offload = {"strategy": "group", "type": "block_level", "num_blocks_per_group": 1}
    pipe = loaded(bundle_of(room, offload=offload))
    for each in (pipe, original):
        _lora(each, adapter)
        each.fuse_lora()
        each.unload_lora_weights()
    np.testing.assert_allclose(image(pipe), image(original), atol=1e-5)


def test_numbers_written_to_weights_that_lie_in_files_are_noticed(room: Path) -> None:
    """diffusers would read the old ones from the file."""
    offload = {"strategy": "group", "type": "block_level", "num_blocks_per_group": 1}
    pipe = loaded(bundle_of(room, offload=offload))
    image(pipe)
    with torch.no_grad():
        _block(pipe).attn.to_q.weight.mul_(3)
    with pytest.raises(CallError, match="its weights were changed in memory"):
        image(pipe)


@pytest.mark.parametrize("way", ["in place", "replaced"])
def test_weights_are_watched_where_the_engine_holds_them(way: str) -> None:
    block = torch.nn.Sequential(torch.nn.Linear(2, 2))
    watch = Watch(block, held=True)
    assert watch.change() == ""
    with torch.no_grad():
        if way == "in place":
            block[0].weight.mul_(2)
        else:
            block[0].weight = torch.nn.Parameter(block[0].weight.clone())
    assert "its weights were" in watch.change()


def test_watching_costs_little_of_a_block(strict: Any) -> None:
    """Far less than an engine's call, which takes some hundred microseconds."""
    (made,) = [value for value in (_block(strict).__dict__["forward"],) if isinstance(value, EngineBlock)]
    assert made._watch is not None
    times = []
    for _ in range(50):
        start = time.perf_counter()
        assert made._watch.change() == ""
        times.append(time.perf_counter() - start)
    assert min(times) < 200e-6
