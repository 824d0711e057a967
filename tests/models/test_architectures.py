"""Known architectures have their true shapes, take no memory as ghosts, and have weights that a seed decides."""

import resource
import time
from types import SimpleNamespace

import pytest
import torch

from diffkiln.errors import SourceError
from diffkiln.models.architectures import architectures
from diffkiln.models.meta import load_module, meta_pipeline, refuse_nonfinite, skeleton
from diffkiln.models.opening import open_source
from diffkiln.models.source import SourceModel
from tests.pipelines import WARNING_FILTERS

pytestmark = [pytest.mark.filterwarnings(line) for line in WARNING_FILTERS]

# Numbers of parameters of the published checkpoints.
PARAMETERS = {
    "flux.1-dev": {
        "text_encoder": 123_060_480,
        "text_encoder_2": 4_762_310_656,
        "transformer": 11_901_408_320,
        "vae": 83_819_683,
    },
    "sdxl-base-1.0": {
        "text_encoder": 123_060_480,
        "text_encoder_2": 694_659_840,
        "unet": 2_567_463_684,
        "vae": 83_653_863,
    },
    "sd-1.5": {"text_encoder": 123_060_480, "unet": 859_520_964, "vae": 83_653_863},
    "sd3.5-medium": {
        "text_encoder": 123_650_304,
        "text_encoder_2": 694_659_840,
        "text_encoder_3": 4_762_310_656,
        "transformer": 2_243_171_520,
        "vae": 83_819_683,
    },
    "pixart-sigma-1024": {"text_encoder": 4_762_310_656, "transformer": 610_856_096, "vae": 83_653_863},
    "wan2.1-t2v-1.3b": {"text_encoder": 5_680_910_336, "transformer": 1_418_996_800, "vae": 126_892_531},
    "wan2.1-t2v-14b": {"text_encoder": 5_680_910_336, "transformer": 14_288_491_584, "vae": 126_892_531},
    "wan2.2-t2v-a14b": {
        "text_encoder": 5_680_910_336,
        "transformer": 14_288_491_584,
        "transformer_2": 14_288_491_584,
        "vae": 126_892_531,
    },
    "qwen-image": {"text_encoder": 8_292_166_656, "transformer": 20_430_401_088, "vae": 126_892_531},
}


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """The user's cache, empty at first."""
    root = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(root))
        yield root / "diffkiln" / "architectures"


def opened(name, seed=0) -> SourceModel:
    return open_source(SimpleNamespace(model=None, revision=None, architecture=name, seed=seed, pipeline=None), None)


def test_every_architecture_is_tested():
    assert PARAMETERS.keys() == architectures().keys()


def test_a_ghost_of_flux_takes_little_time_and_memory():
    source = opened("flux.1-dev")
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    ghost = meta_pipeline(source)
    assert time.process_time() - start < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1_000_000  # KiB
    assert_true_shapes(ghost, source)


def assert_true_shapes(ghost, source):
    name = source.origin["architecture"]
    counts = {part: sum(p.numel() for p in getattr(ghost, part).parameters()) for part in source.modules}
    assert counts == PARAMETERS[name]
    assert {getattr(ghost, part).dtype for part in counts} == {getattr(torch, architectures()[name].dtype)}


@pytest.mark.parametrize(
    "name",
    [
        "sdxl-base-1.0",
        "sd-1.5",
        "pixart-sigma-1024",
        "qwen-image",
        *(name for name in PARAMETERS if name.startswith("wan")),
    ],
)
def test_shapes_are_the_true_ones(name):
    source = opened(name)
    assert_true_shapes(meta_pipeline(source), source)


# Its table of positions is computed in double precision, by `from_pretrained` too: 3.5 GB for 10 s.
def test_sd35_medium_has_its_true_shapes_but_for_the_table_of_positions():
    from diffusers import SD3Transformer2DModel

    with torch.device("meta"):
        config = architectures()["sd3.5-medium"].parts["transformer"].config
        transformer = SD3Transformer2DModel.from_config(config | {"pos_embed_max_size": 8})
    assert sum(p.numel() for p in transformer.parameters()) == PARAMETERS["sd3.5-medium"]["transformer"]
    assert opened("sd3.5-medium").modules == tuple(PARAMETERS["sd3.5-medium"])


def test_knows_the_size_of_weights_that_are_not_there():
    source = opened("flux.1-dev")
    assert source.dtypes == dict.fromkeys(source.modules, "bfloat16")
    assert source.weight_bytes("transformer") == 2 * PARAMETERS["flux.1-dev"]["transformer"]


def test_weights_follow_seed_and_component_and_nothing_else():
    first = load_module(opened("flux.1-dev"), "vae").state_dict()
    torch.manual_seed(1)
    again = load_module(opened("flux.1-dev"), "vae").state_dict()
    other = load_module(opened("flux.1-dev", seed=1), "vae").state_dict()
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not any(torch.equal(first[key], other[key]) for key in first)


def test_loaded_modules_are_whole_and_finite():
    source = opened("sd-1.5")
    for name in ("vae", "text_encoder"):
        module = load_module(source, name, "bfloat16")
        refuse_nonfinite(module, name)
        expected = {key: (t.shape, t.dtype) for key, t in skeleton(source, name, "bfloat16").state_dict().items()}
        assert {key: (t.shape, t.dtype) for key, t in module.state_dict().items()} == expected
        assert not module.training
        assert not any(parameter.requires_grad for parameter in module.parameters())


@torch.no_grad()
def test_activations_stay_near_unit_scale():
    source = opened("sd-1.5")
    hidden = load_module(source, "text_encoder")(torch.arange(77)[None]).last_hidden_state
    image = load_module(source, "vae").decode(torch.randn(1, 4, 16, 16)).sample
    assert 0.1 < hidden.std() < 10
    assert 0.1 < image.std() < 10


def test_no_gate_of_a_block_is_shut():
    from diffusers import FluxTransformer2DModel

    from diffkiln.models.stand_ins import fill_with_noise

    transformer = FluxTransformer2DModel(
        num_layers=1, num_single_layers=1, num_attention_heads=2, attention_head_dim=16, axes_dims_rope=(4, 6, 6)
    ).requires_grad_(False)
    fill_with_noise(transformer, "seed")
    shift, scale, gate, *_ = transformer.transformer_blocks[0].norm1.linear(torch.randn(1, 32)).chunk(6, dim=1)
    assert min(part.abs().mean() for part in (shift, scale, gate)) > 0.1


@pytest.mark.parametrize(
    ("name", "key", "size", "bos", "eos", "pad", "longest"),
    [
        ("flux.1-dev", "tokenizer", 49408, 49406, 49407, 49407, 77),
        ("flux.1-dev", "tokenizer_2", 32100, None, 1, 0, 512),
        ("sdxl-base-1.0", "tokenizer_2", 49408, 49406, 49407, 0, 77),
    ],
)
def test_stand_in_tokenizers_have_the_true_ids(name, key, size, bos, eos, pad, longest):
    source = opened(name)
    tokenizer = source.components[key].kind.from_pretrained(source.folder / key, local_files_only=True)
    assert len(tokenizer) == size
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (bos, eos, pad)
    assert tokenizer.model_max_length == longest
    short, long = tokenizer(["A red fox, 2 cats!", "x " * 600], padding="max_length", truncation=True).input_ids
    assert len(short) == len(long) == longest
    assert short[-1] == pad
    assert long[-1] == eos
    assert tokenizer.unk_token_id not in short or tokenizer.unk_token_id in (bos, eos, pad)
    assert "red fox" in tokenizer.decode(short)


def test_the_stand_in_for_qwens_tokenizer_knows_the_turns_of_a_chat():
    source = opened("qwen-image")
    tokenizer = source.components["tokenizer"].kind.from_pretrained(source.folder / "tokenizer", local_files_only=True)
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, len(tokenizer)) == (151643, 151645, 151646)
    ids = tokenizer("<|im_start|>user\nA red fox<|im_end|>").input_ids
    assert [ids[0], ids[-1]] == [151644, 151645]
    assert tokenizer.decode(ids[1:-1]) == "user\nA red fox"


def test_stands_for_itself_by_name_and_seed():
    source = opened("sd-1.5")
    assert source.pinned() == {"architecture": "sd-1.5", "seed": 0, "digest": source.digest()}
    digests = {opened("sd-1.5").digest(), opened("sd-1.5", seed=1).digest(), opened("sdxl-base-1.0").digest()}
    assert len(digests) == 3
    assert source.digest() in digests


def test_writes_its_folder_once_and_the_same_anywhere(cache, tmp_path, monkeypatch):
    first = opened("sd-1.5")
    written = (first.folder / "model_index.json").stat().st_mtime_ns
    assert first.folder.parent == cache
    assert (opened("sd-1.5", seed=5).folder / "model_index.json").stat().st_mtime_ns == written
    assert not list(cache.glob(".*"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    second = opened("sd-1.5")
    assert second.folder != first.folder
    assert second.digest() == first.digest()


def test_a_cache_that_cannot_be_written_is_a_source_error(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(SourceError, match=r"sd-1\.5 cannot be written"):
        opened("sd-1.5")


def test_names_the_architecture_that_was_meant():
    with pytest.raises(SourceError, match=r"\$\.source\.architecture.*Did you mean 'flux\.1-dev'\?"):
        opened("FLUX.1dev")
    with pytest.raises(SourceError, match=r"Known are flux\.1-dev, pixart-sigma-1024, qwen-image, sdxl-base-1\.0"):
        opened("a horse")
