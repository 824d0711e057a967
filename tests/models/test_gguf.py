"""GGUF files as a component's weights: what diffusers computes with them, bit for bit."""

import numpy as np
import pytest
import torch

import diffkiln
from diffkiln.errors import IllegalPlan, SourceError, SpecError
from diffkiln.interpreter.layers import Stored
from diffkiln.models.meta import load_module, meta_pipeline
from diffkiln.models.opening import open_source
from diffkiln.models.weights import weights_of
from diffkiln.spec import Source
from tests.passes.calls import call_of, replays, result_of
from tests.passes.plans import real, source
from tests.pipelines import WARNING_FILTERS

gguf = pytest.importorskip("gguf")
pytestmark = [pytest.mark.filterwarnings(text) for text in WARNING_FILTERS]


def write(path, state, kind="Q8_0", drop=()):
    """A GGUF file of these tensors: matrices in blocks of `kind`, the others as they are."""
    writer = gguf.GGUFWriter(path, "flux")
    quantized = gguf.GGMLQuantizationType[kind]
    for name, tensor in state.items():
        data = tensor.float().numpy()
        if name in drop:
            continue
        if data.ndim == 2 and data.shape[1] % 32 == 0:
            writer.add_tensor(name, gguf.quants.quantize(data, quantized), raw_dtype=quantized)
        else:
            writer.add_tensor(name, np.ascontiguousarray(data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def opened(file, **more):
    return open_source(Source(model=str(source("flux").folder), gguf={"transformer": str(file)}, **more), file.parent)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return write(tmp_path_factory.mktemp("gguf") / "model.gguf", real("flux", "transformer").state_dict())


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "BF16"])
def test_what_it_computes_is_what_diffusers_computes(tmp_path, kind):
    from diffusers import FluxTransformer2DModel, GGUFQuantizationConfig

    path = write(tmp_path / "model.gguf", real("flux", "transformer").state_dict(), kind)
    model = opened(path, dtype="float32")
    ghost, module = meta_pipeline(model, "float32").transformer, load_module(model, "transformer", "float32")
    told = {name: (tuple(t.shape), t.dtype) for name, t in weights_of(ghost)}
    assert told == {name: (tuple(t.shape), t.dtype) for name, t in weights_of(module)}
    assert any(isinstance(part, Stored) for part in module.modules()) == (kind != "BF16")
    theirs = FluxTransformer2DModel.from_single_file(
        str(path),
        quantization_config=GGUFQuantizationConfig(compute_dtype=torch.float32),
        config=str(model.folder),
        subfolder="transformer",
        dtype=torch.float32,
    )
    leaves, structure = call_of("flux", "transformer")
    found = result_of(module, leaves, structure)
    assert torch.equal(found, result_of(theirs, leaves, structure))
    replays(ghost, module, leaves, structure)


def test_a_component_without_a_checkpoint_of_its_own(tmp_path, file):
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(source("flux").folder, folder)
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    model = open_source(Source(model=str(folder), gguf={"transformer": str(file)}), tmp_path)
    assert model.dtypes["transformer"] == "bfloat16"
    assert any(isinstance(part, Stored) for part in meta_pipeline(model).transformer.modules())


def test_the_digest_covers_the_file_and_no_path_is_told(tmp_path, file):
    other = write(tmp_path / "other.gguf", real("flux", "transformer").state_dict(), "Q4_0")
    assert opened(file).digest() != opened(other).digest()
    assert opened(file).digest() != source("flux").digest()
    assert str(file.parent) not in str(opened(file).pinned())
    assert opened(file).pinned()["gguf"]["transformer"].startswith("sha256:")


def test_a_file_that_lacks_tensors_is_refused(tmp_path):
    path = write(tmp_path / "cut.gguf", real("flux", "transformer").state_dict(), drop=("proj_out.bias",))
    with pytest.raises(SourceError, match=r"cut\.gguf .*"):
        meta_pipeline(opened(path))


def test_a_file_of_another_shape_is_refused(tmp_path):
    state = real("flux", "transformer").state_dict() | {"proj_out.bias": torch.zeros(3)}
    path = write(tmp_path / "wide.gguf", state)
    with pytest.raises(SourceError, match=r"holds proj_out\.bias as \(3,\)"):
        meta_pipeline(opened(path))


def test_what_is_no_gguf_file_is_refused(tmp_path):
    (tmp_path / "no.gguf").write_bytes(b"nothing of that kind")
    with pytest.raises(SourceError, match=r"no\.gguf cannot be read"):
        meta_pipeline(opened(tmp_path / "no.gguf"))


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"transfomer": "model.gguf"}, "not a component that diffusers loads"),
        ({"transformer": "nowhere.gguf"}, "no file"),
    ],
)
def test_its_place_in_the_spec_is_named(file, given, reason):
    with pytest.raises(SourceError, match=reason) as caught:
        open_source(Source(model=str(source("flux").folder), gguf=given), file.parent)
    assert caught.value.problems[0].where == f"$.source.gguf.{next(iter(given))}"


def test_an_architecture_has_no_files():
    with pytest.raises(SpecError, match="only a"):
        diffkiln.parse_spec(
            {
                "spec_version": 1,
                "source": {"architecture": "flux.1-dev", "seed": 0, "gguf": {"transformer": "a.gguf"}},
                "target": {"device": "cpu"},
                "inputs": {"height": 64, "width": 64, "num_inference_steps": 2},
            }
        )


@pytest.mark.parametrize("name", ["compile", "quantize", "fuse_qkv", "cast", "layerwise_cast"])
def test_passes_that_cannot_follow_say_so(file, name):
    entry = {"name": name, "component": "transformer"}
    entry |= {"quantize": {"type": "int8_weight_only"}, "cast": {"dtype": "float16"}}.get(name, {})
    spec = {
        "spec_version": 1,
        "source": {"model": str(source("flux").folder), "gguf": {"transformer": str(file)}},
        "target": {"device": "cpu"},
        "inputs": {"height": 64, "width": 64, "num_inference_steps": 2},
        "passes": [entry],
    }
    with pytest.raises(IllegalPlan, match=rf"{name} cannot follow source\.gguf: "):
        diffkiln.check(spec)
