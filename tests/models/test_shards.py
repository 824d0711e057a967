"""A portion is what `from_pretrained` loads, and nothing else has data."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffkiln.errors import SourceError
from diffkiln.models.meta import load_module
from diffkiln.models.opening import open_source
from diffkiln.models.shards import OUTSIDE, Shards, open_shards
from diffkiln.models.weights import weights_of
from diffkiln.spec import Source
from tests.pipelines import WARNING_FILTERS, build_folder

pytestmark = [pytest.mark.filterwarnings(line) for line in WARNING_FILTERS]

#: Of both libraries, with tied weights, buffers that are saved, and types that stay in float32.
TRIED = ("flux", "qwen_image", "sd3", "sdxl", "wan")


def opened(folder):
    return open_source(Source(model=str(folder)), Path())


def in_portions(folder, name, dtype=None) -> Shards:
    found = open_shards(opened(folder), name, dtype)
    assert isinstance(found, Shards), found
    return found


@pytest.mark.parametrize("family", TRIED)
def test_portions_together_are_what_from_pretrained_gives(family, families):
    """float16 is the type in which most is kept in float32."""
    source = opened(build_folder(family, families))
    tried = 0
    for name in source.modules:
        found = open_shards(source, name, "float16")
        if isinstance(found, str):
            continue
        tried += 1
        wanted = dict(weights_of(load_module(source, name, "float16")))
        came = {}
        for unit in found.sizes():
            module = found.load([unit])
            assert not module.training
            real = {key: tensor for key, tensor in weights_of(module) if not tensor.is_meta}
            assert real.keys() == {key for key, owner in found.units.items() if owner == unit}
            came |= real
        assert came.keys() == wanted.keys()
        assert all(torch.equal(came[key], tensor) and came[key].dtype == tensor.dtype for key, tensor in wanted.items())
    assert tried, "no component of the family can be streamed"


def test_a_portion_has_memory_of_its_own(families, tmp_path):
    """Not the file's, which would count as the process's for as long as a tensor is there, and could change."""
    folder = shutil.copytree(build_folder("flux", families), tmp_path / "flux")
    found = in_portions(folder, "transformer")
    module = found.load([OUTSIDE])
    before = module.x_embedder.weight.clone()
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    with file.open("r+b") as opened_file:
        opened_file.truncate(64)
    assert torch.equal(module.x_embedder.weight, before)
    with pytest.raises(SourceError, match=r"component transformer: \S+ cannot be read from diffusion_pytorch_model"):
        found.load([OUTSIDE])


def test_drawn_weights_are_the_same_in_portions(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = open_source(Source(architecture="sd-1.5", seed=3), Path())
    found = open_shards(source, "text_encoder")
    assert isinstance(found, Shards)
    whole = dict(weights_of(load_module(source, "text_encoder")))
    unit = next(unit for unit in found.sizes() if unit != OUTSIDE)
    real = {key: tensor for key, tensor in weights_of(found.load([unit])) if not tensor.is_meta}
    assert real
    assert all(torch.equal(tensor, whole[key]) for key, tensor in real.items())


def test_tied_weights_come_once(families):
    found = in_portions(build_folder("flux", families), "text_encoder_2")
    module = found.load([OUTSIDE])
    assert module.shared.weight is module.encoder.embed_tokens.weight
    assert not module.shared.weight.is_meta


def changed(folder, change):
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})
    return open_shards(opened(folder), "transformer")


def test_what_only_the_library_can_load_is_told(families, tmp_path):
    folder = shutil.copytree(build_folder("flux", families), tmp_path / "flux")
    reason = changed(folder, lambda weights: weights.update({"other.bias": weights.pop("x_embedder.bias")}))
    assert reason == "its checkpoint holds no tensor of the name and shape of x_embedder.bias"
    reason = changed(folder, lambda weights: weights.update({"x_embedder.bias": torch.zeros(3)}))
    assert reason == "its checkpoint holds no tensor of the name and shape of x_embedder.bias"


def test_a_component_without_blocks_is_told(families):
    assert open_shards(opened(build_folder("wan", families)), "vae") == "AutoencoderKLWan has no repeated blocks"
