"""What a source may be, what is read of it, and how everything else is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffkiln.errors import SourceError
from diffkiln.interpreter.quiet import quiet_libraries
from diffkiln.models.opening import open_source
from diffkiln.models.source import SourceModel
from diffkiln.spec import Source
from tests.coverage.calls import CALLS
from tests.pipelines import WARNING_FILTERS, build_folder

pytestmark = [pytest.mark.filterwarnings(line) for line in WARNING_FILTERS]

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def declare(model=None, revision=None, architecture=None, seed=None):
    """What the spec says of the source, without the spec's own checks."""
    told = {"model": model, "revision": revision, "architecture": architecture, "seed": seed}
    return Source.model_construct(**told)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return build_folder("sd", tmp_path_factory.mktemp("pipelines"))


@pytest.fixture
def folder(original, tmp_path):
    """A copy to break."""
    return shutil.copytree(original, tmp_path / "model")


def opened(folder) -> SourceModel:
    return open_source(declare(folder.name), folder.parent)


def refusal(folder) -> str:
    with pytest.raises(SourceError) as caught:
        opened(folder)
    assert caught.value.exit_code == 2
    return str(caught.value)


def edit(path, **changes):
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | changes))


def test_lists_modules_in_the_order_of_the_index(original):
    source = opened(original)
    assert source.class_name == "StableDiffusionPipeline"
    assert source.modules == ("text_encoder", "unet", "vae")
    assert source.folder == original


def test_finds_an_absolute_path_and_one_relative_to_the_base(original, tmp_path):
    assert open_source(declare(str(original)), tmp_path).folder == original
    assert open_source(declare(original.name), original.parent).folder == original


def test_reads_dtype_and_size_from_headers(folder):
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(path).items()}
    weights["conv_in.bias"] = weights["conv_in.bias"].float()
    save_file(weights, path)
    source = opened(folder)
    assert source.dtypes == {"text_encoder": "float32", "unet": "bfloat16", "vae": "float32"}
    assert source.weight_bytes("unet") == sum(tensor.nbytes for tensor in weights.values())


def test_reads_shards(folder):
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    unet.save_pretrained(folder / "unet", max_shard_size="200KB")
    source = opened(folder)
    shards = [name for name in source.files() if name.startswith("unet/diffusion_pytorch_model-")]
    assert len(shards) > 1
    assert source.weight_bytes("unet") == sum(tensor.nbytes for tensor in unet.state_dict().values())


def test_uses_configurations_tokenizers_and_one_copy_of_the_weights(folder):
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"a pickle beside the safetensors")
    (folder / "unet" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"a variant")
    (folder / "README.md").write_text("about")
    (folder / "tokenizer" / ".cache").write_text("hidden")
    (folder / "tokenizer" / ".git").mkdir()
    (folder / "tokenizer" / ".git" / "config.json").write_text("hidden")
    (folder / "tokenizer" / "HEAD").write_text("of a repository")
    (folder / "tokenizer" / "flax_model.msgpack").write_text("a pickle")
    assert opened(folder).files() == (
        "model_index.json",
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    )


def test_digest_follows_every_file_that_is_used_and_nothing_else(original, folder):
    first = opened(original).digest()
    assert first.startswith("sha256:")
    assert opened(folder).digest() == first
    (folder / "README.md").write_text("about")
    assert opened(folder).digest() == first
    edit(folder / "scheduler" / "scheduler_config.json", beta_start=0.001)
    second = opened(folder).digest()
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert len({first, second, opened(folder).digest()}) == 3


def test_digest_is_computed_once(folder):
    source = opened(folder)
    first = source.digest()
    (folder / "model_index.json").unlink()
    assert source.digest() == first


def test_pins_a_local_folder_by_digest_alone(original):
    source = opened(original)
    assert source.pinned() == {"digest": source.digest()}


def test_leaves_out_an_image_encoder_that_only_adapters_use(folder):
    edit(folder / "model_index.json", image_encoder=["transformers", "CLIPVisionModelWithProjection"])
    source = opened(folder)
    assert "image_encoder" not in source.modules
    assert "IP adapters" in source.notices[0]


def test_refuses_a_folder_that_is_not_there(tmp_path):
    message = refusal(tmp_path / "nowhere")
    assert "there is no folder nowhere" in message
    assert str(tmp_path) in message


def test_refuses_an_empty_folder(tmp_path):
    assert "is empty" in refusal(tmp_path)


def test_refuses_a_foreign_folder_and_says_what_it_holds(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").touch()
    message = refusal(tmp_path)
    assert "no model_index.json, but config.json, pytorch_model.bin" in message
    assert "save_pretrained" in message


@pytest.mark.parametrize("model", ["a\0b", "x" * 5000, "~nobody-of-this-name/x", "."])
def test_refuses_a_path_that_is_none(tmp_path, model):
    with pytest.raises(SourceError):
        open_source(declare(model), tmp_path)


def test_refuses_a_file_that_goes_away(folder):
    source = opened(folder)
    (folder / "vae" / "config.json").unlink()
    with pytest.raises(SourceError, match=r"vae/config\.json cannot be read"):
        source.digest()


def test_refuses_a_single_file(tmp_path):
    (tmp_path / "model.safetensors").touch()
    assert '"single_file": "model.safetensors"' in refusal(tmp_path / "model.safetensors")


@pytest.mark.parametrize("content", ["{", "[" * 100_000, '"text"', "{}", "\xff"])
def test_refuses_a_broken_index(folder, content):
    (folder / "model_index.json").write_text(content, encoding="latin-1")
    assert "model_index.json" in refusal(folder)


def test_names_the_diffusers_that_lacks_the_pipeline(folder):
    import diffusers

    edit(folder / "model_index.json", _class_name="StableDiffusion9Pipeline")
    message = refusal(folder)
    assert "StableDiffusion9Pipeline" in message
    assert diffusers.__version__ in message


def test_refuses_a_class_that_is_no_pipeline(folder):
    edit(folder / "model_index.json", _class_name="UNet2DConditionModel")
    assert "not a pipeline" in refusal(folder)


def test_names_the_transformers_that_lacks_the_class(folder):
    import transformers

    edit(folder / "model_index.json", text_encoder=["transformers", "CLIP9TextModel"])
    message = refusal(folder)
    assert "component text_encoder" in message
    assert f"transformers {transformers.__version__}" in message


def test_lists_all_problems_at_once(folder):
    shutil.rmtree(folder / "vae")
    shutil.rmtree(folder / "scheduler")
    (folder / "unet" / "config.json").write_text("{")
    message = refusal(folder)
    assert "the folder vae is missing" in message
    assert "the folder scheduler is missing" in message
    assert "component unet: config.json" in message


def test_refuses_pickled_weights_with_the_reason(folder):
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    message = refusal(folder)
    assert "diffusion_pytorch_model.bin" in message
    assert "can run code" in message
    assert "safe_serialization=True" in message


def test_refuses_a_component_without_weights(folder):
    (folder / "text_encoder" / "model.safetensors").unlink()
    assert "no model.safetensors" in refusal(folder)


def test_refuses_weights_that_are_only_there_as_a_variant(folder):
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".fp16.safetensors"))
    assert "variant diffusion_pytorch_model.fp16.safetensors" in refusal(folder)


@pytest.mark.parametrize(
    ("shard", "message"),
    [
        ("model-00001-of-00002.safetensors", "which is missing"),
        ("../vae/diffusion_pytorch_model.safetensors", "not a safetensors file beside it"),
        ("model.bin", "not a safetensors file beside it"),
    ],
)
def test_refuses_an_index_that_names_another_file(folder, shard, message):
    (folder / "text_encoder" / "model.safetensors").unlink()
    (folder / "text_encoder" / "model.bin").touch()
    index = folder / "text_encoder" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": shard}}))
    assert message in refusal(folder)


def test_refuses_truncated_weights(folder):
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "cut short" in refusal(folder)


def test_knows_a_git_lfs_pointer(folder):
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n")
    assert "git lfs pull" in refusal(folder)


def test_refuses_weights_that_are_quantized_in_a_way_that_has_no_layers(folder):
    edit(folder / "unet" / "config.json", quantization_config={"quant_method": "gptq"})
    assert "quantized already, by gptq" in refusal(folder)


HOSTILE = "raise SystemExit('code of the model was run')"


def test_never_imports_a_component_of_the_models_own(folder):
    (folder / "unet" / "my_unet.py").write_text(HOSTILE)
    edit(folder / "model_index.json", unet=["my_unet", "MyUNet"])
    assert "never run" in refusal(folder)


def test_never_imports_code_that_lies_beside_a_known_class(folder):
    (folder / "scheduler" / "diffusers.py").write_text(HOSTILE)
    assert "diffusers.py" in refusal(folder)


def test_never_imports_a_pipeline_of_the_models_own(folder):
    (folder / "pipeline.py").write_text(HOSTILE)
    edit(folder / "model_index.json", _class_name=["pipeline", "MyPipeline"])
    assert "never run" in refusal(folder)


def test_refuses_a_tokenizer_that_asks_for_code(folder):
    edit(folder / "tokenizer" / "tokenizer_config.json", auto_map={"AutoTokenizer": ["x--y.Z", None]})
    assert "auto_map" in refusal(folder)


@pytest.mark.parametrize(
    ("file", "entry"),
    [
        ("text_encoder/config.json", {"_attn_implementation": "kernels-community/x"}),
        ("text_encoder/config.json", {"text_config": {"attn_implementation": "someone/x"}}),
        ("unet/config.json", {"auto_map": {"AutoModel": "code.Model"}}),
        ("vae/config.json", {"_class_name": "code.VAE"}),
        ("scheduler/scheduler_config.json", {"trust_remote_code": True}),
        ("tokenizer/tokenizer_config.json", {"tokenizer_class": "code.Tokenizer"}),
    ],
)
def test_refuses_configurations_that_have_a_library_fetch_or_run_code(folder, file, entry):
    edit(folder / file, **entry)
    said = refusal(folder)
    assert f"{Path(file).name}: $.{next(iter(entry))}" in said


def test_refuses_the_file_that_diffusers_takes_for_a_custom_pipeline(folder):
    (folder / "None.py").write_text(HOSTILE)
    assert "None.py" in refusal(folder)


def test_code_that_nothing_takes_is_left_alone(folder):
    """Repositories often hold a script for a server."""
    (folder / "handler.py").write_text(HOSTILE)
    opened(folder)


def test_refuses_a_class_whose_module_fetches_kernels(folder):
    edit(folder / "model_index.json", text_encoder=["transformers", "YosoModel"])
    assert "takes code or a model from elsewhere" in refusal(folder)


@pytest.mark.parametrize("entry", [["os", "system"], ["transformers", "AutoModel"], ["diffusers", "utils"], [1, 2]])
def test_refuses_a_component_of_any_other_library(folder, entry):
    edit(folder / "model_index.json", text_encoder=entry)
    assert "component text_encoder" in refusal(folder)


def test_refuses_a_component_name_that_leaves_the_folder(folder):
    edit(folder / "model_index.json", **{"../vae": ["diffusers", "AutoencoderKL"]})
    assert "not an identifier" in refusal(folder)


def test_a_local_folder_has_no_revision(original):
    with pytest.raises(SourceError, match="has no revisions"):
        open_source(declare(original.name, COMMIT), original.parent)


def test_a_repository_needs_a_revision(tmp_path):
    with pytest.raises(SourceError, match=r"needs a revision.*40 hexadecimal digits"):
        open_source(declare("owner/name"), tmp_path)


def test_a_branch_is_no_revision(tmp_path):
    with pytest.raises(SourceError, match="cannot be pinned to 'main'"):
        open_source(declare("owner/name", "main"), tmp_path)


def test_says_that_a_repository_cannot_be_had_offline(tmp_path, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(SourceError, match="owner/name at 0123456789ab cannot be had from the Hub"):
        open_source(declare("owner/name", COMMIT), tmp_path)


def test_takes_a_snapshot_of_a_repository_without_pickles(original, tmp_path, monkeypatch):
    import huggingface_hub

    asked = []

    def snapshot_download(repo, *, revision, allow_patterns):
        assert (repo, revision) == ("owner/name", COMMIT)
        asked.append(allow_patterns)
        return str(original)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    source = open_source(declare("owner/name", COMMIT), tmp_path)
    assert source.pinned() == {"model": "owner/name", "revision": COMMIT, "digest": source.digest()}
    assert asked[0] == ["model_index.json", "modular_model_index.json"]
    wanted = huggingface_hub.utils.filter_repo_objects
    assert set(wanted(source.files(), allow_patterns=asked[1])) == set(source.files())
    unwanted = [
        "flux.safetensors",
        "unet/diffusion_pytorch_model.bin",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "unet/unet.py",
        "safety_checker/model.safetensors",
    ]
    assert not list(wanted(unwanted, allow_patterns=asked[1]))


def test_refuses_a_repository_that_is_no_pipeline(tmp_path, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path))
    with pytest.raises(SourceError, match="owner/name is not a diffusers pipeline"):
        open_source(declare("owner/name", COMMIT), tmp_path)


def test_a_modular_pipeline_without_blocks_of_its_own_is_refused(tmp_path):
    (tmp_path / "modular_model_index.json").write_text('{"_class_name": "ModularPipeline"}')
    with pytest.raises(SourceError, match="does not say which blocks it has"):
        open_source(declare(str(tmp_path)), tmp_path)


def test_a_pipeline_of_pipelines_is_opened_where_its_folder_has_all_that_it_needs(tmp_path):
    folder = build_call("kandinsky22_combined", tmp_path)
    assert open_source(declare(str(folder)), tmp_path).class_name == "KandinskyV22CombinedPipeline"
    index = json.loads((folder / "model_index.json").read_text())
    del index["prior_prior"]
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(
        SourceError, match=r"has diffusers fetch the pipelines that it is made of, here for prior_prior"
    ):
        open_source(declare(str(folder)), tmp_path)


def build_call(name, root):
    folder = root / name
    with quiet_libraries():
        CALLS[name].build().save_pretrained(folder, safe_serialization=True)
    return folder


def test_a_part_that_the_pipeline_makes_itself_is_no_component(tmp_path):
    """LongCat's scheduler is in its index, and diffusers neither saves nor loads it."""
    folder = build_call("longcat_audio", tmp_path)
    assert "scheduler" in json.loads((folder / "model_index.json").read_text())
    assert "scheduler" not in opened(folder).components


def test_a_list_of_numbers_is_an_argument_of_the_pipeline(folder):
    edit(folder / "model_index.json", sizes=[0.5, 1.0])
    assert "sizes" not in opened(folder).components
