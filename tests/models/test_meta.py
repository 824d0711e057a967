"""A ghost is what `from_pretrained` gives, without the memory; and a loaded module is looked through."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffkiln.errors import BuildError, SourceError
from diffkiln.models.meta import load_module, meta_pipeline, refuse_nonfinite
from diffkiln.models.opening import open_source
from diffkiln.spec import Source
from tests.pipelines import FAMILIES, WARNING_FILTERS, build_folder

pytestmark = [pytest.mark.filterwarnings(line) for line in WARNING_FILTERS]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return tmp_path_factory.mktemp("pipelines")


def opened(folder):
    return open_source(Source.model_construct(model=str(folder)), folder)


def described(module):
    """All that must be equal of two modules but the weights themselves."""
    tensors = {name: (t.shape, t.stride(), t.dtype) for name, t in module.state_dict().items()}
    return tensors, [name for name, _ in module.named_parameters()], [name for name, _ in module.named_buffers()]


# float16 is the type in which most is kept in float32: T5's `wo`, and diffusers' own lists.
@pytest.mark.parametrize(
    ("family", "dtype"), [*((name, "float16") for name in sorted(FAMILIES)), ("flux", "bfloat16"), ("sd3", "float32")]
)
def test_ghosts_are_what_from_pretrained_gives(family, dtype, folders):
    source = opened(build_folder(family, folders))
    pipe = meta_pipeline(source, dtype)
    assert type(pipe) is source.pipeline_class
    for name in source.modules:
        ghost, real = getattr(pipe, name), load_module(source, name, dtype)
        assert described(ghost) == described(real)
        saved = ghost.state_dict()
        assert all(tensor.is_meta for tensor in saved.values())
        for key, buffer in real.named_buffers():
            if key not in saved:
                assert torch.equal(buffer, ghost.get_buffer(key))
                assert buffer.dtype == ghost.get_buffer(key).dtype
        for module in (ghost, real):
            assert not module.training
            assert not any(parameter.requires_grad for parameter in module.parameters())


def test_the_rest_of_the_pipeline_is_real(folders):
    from diffusers import DiffusionPipeline

    folder = build_folder("sdxl", folders)
    source = opened(folder)
    ghost = meta_pipeline(source)
    real = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    assert ghost.tokenizer("A cat").input_ids == real.tokenizer("A cat").input_ids
    assert ghost.scheduler.config == real.scheduler.config
    assert dict(ghost.config) == dict(real.config) | {"_name_or_path": ghost.config._name_or_path}


def test_tied_weights_stay_tied(folders):
    ghost = meta_pipeline(opened(build_folder("flux", folders))).text_encoder_2
    assert ghost.shared.weight is ghost.encoder.embed_tokens.weight


def test_defaults_to_the_type_that_was_saved(folders, tmp_path):
    folder = shutil.copytree(build_folder("sd", folders), tmp_path / "sd")
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(path).items()}, path)
    source = opened(folder)
    pipe = meta_pipeline(source)
    assert (pipe.unet.dtype, pipe.vae.dtype) == (torch.bfloat16, torch.float32)
    assert load_module(source, "unet").dtype == torch.bfloat16


def test_leaves_global_state_alone(folders):
    from transformers.utils import logging

    before = torch.get_rng_state()
    meta_pipeline(opened(build_folder("sd3", folders)), "bfloat16")
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_default_dtype() == torch.float32
    assert logging.is_progress_bar_enabled()


def test_loading_refuses_weights_that_lack_a_tensor(folders, tmp_path):
    folder = shutil.copytree(build_folder("sd", folders), tmp_path / "sd")
    for name, file in [("unet", "diffusion_pytorch_model"), ("text_encoder", "model")]:
        path = folder / name / f"{file}.safetensors"
        weights = load_file(path)
        lost = sorted(weights)[0]
        del weights[lost]
        save_file(weights, path, metadata={"format": "pt"})
        with pytest.raises(SourceError, match=f"component {name}: .*lack 1 tensor.*{lost}"):
            load_module(opened(folder), name)


def test_loading_refuses_weights_of_another_shape(folders, tmp_path):
    folder = shutil.copytree(build_folder("sd", folders), tmp_path / "sd")
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    save_file(weights | {"conv_in.bias": torch.zeros(3)}, path)
    with pytest.raises(SourceError, match=r"component unet .*conv_in\.bias"):
        load_module(opened(folder), "unet")


def test_a_configuration_that_builds_nothing_is_a_source_error(folders, tmp_path):
    folder = shutil.copytree(build_folder("sd", folders), tmp_path / "sd")
    config = json.loads((folder / "unet" / "config.json").read_text())
    (folder / "unet" / "config.json").write_text(json.dumps(config | {"down_block_types": ["NoBlock", "NoBlock"]}))
    with pytest.raises(SourceError, match="component unet cannot be loaded"):
        meta_pipeline(opened(folder))


TYPES = [torch.float32, torch.bfloat16, torch.float16]
BAD = [(dtype, float(value)) for dtype in TYPES for value in ("nan", "inf", "-inf")]


@pytest.mark.parametrize(("dtype", "value"), [*BAD, (torch.float8_e4m3fn, float("nan"))])
def test_finds_a_value_that_is_not_finite(dtype, value):
    module = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)).requires_grad_(False)
    refuse_nonfinite(module, "unet")
    module[1].weight[2, 3] = value
    module[1].weight = torch.nn.Parameter(module[1].weight.to(dtype), requires_grad=False)
    with pytest.raises(BuildError, match=r"component unet: 1 of the 16 values of 1\.weight"):
        refuse_nonfinite(module, "unet")


def test_what_a_pass_made_infinite_is_told_with_the_mend():
    module = torch.nn.Sequential(torch.nn.Linear(4, 4)).requires_grad_(False)
    module[0].weight[0, 0] = 1e6
    refuse_nonfinite(module, "unet")
    module.half()
    with pytest.raises(
        BuildError, match=r"1 of the 16 values of 0\.weight are NaN or infinite after the passes.*bfloat16"
    ):
        refuse_nonfinite(module, "unet", "after the passes")
