"""The tiny pipelines are worth testing with: they load offline, and prompt and seed both reach the image."""

import pytest
import torch

from tests.pipelines import FAMILIES, WARNING_FILTERS, build_folder
from tests.pipelines.registry import randomise_module, seeded

pytestmark = [pytest.mark.filterwarnings(line) for line in WARNING_FILTERS]

REQUIRED = {"sd", "sdxl", "sd3", "pixart_sigma", "flux"}
PROMPTS = ("a small cat on a mountain", "two Red foxes near the river at night")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return tmp_path_factory.mktemp("pipelines")


@pytest.fixture(params=sorted(FAMILIES), scope="module")
def loaded(request, folders):
    """A family, its pipeline as it comes from the saved folder, offline, and the first sample that it gave."""
    from diffusers import DiffusionPipeline

    family = FAMILIES[request.param]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        pipe = DiffusionPipeline.from_pretrained(build_folder(family.name, folders), local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return family, pipe, _sample(family, pipe)


def _sample(family, pipe, prompt=PROMPTS[0], seed=7):
    generator = torch.Generator("cpu").manual_seed(seed)
    output = pipe(prompt=prompt, generator=generator, output_type="pt", **family.call)
    return output.frames if family.video else output.images


def test_has_the_families_that_every_part_is_tested_with():
    assert set(FAMILIES) >= REQUIRED


def test_gives_a_finite_image_of_the_size_asked_for(loaded):
    family, _, sample = loaded
    frames = (family.call["num_frames"],) if family.video else ()
    assert sample.shape == (1, *frames, 3, family.call["height"], family.call["width"])
    assert sample.isfinite().all()
    assert sample.std() > 0.05


def test_repeats_itself_with_the_same_seed(loaded):
    family, pipe, sample = loaded
    assert torch.equal(_sample(family, pipe), sample)


def test_follows_the_prompt(loaded):
    family, pipe, sample = loaded
    assert (_sample(family, pipe, prompt=PROMPTS[1]) - sample).abs().mean() > 1e-3


def test_follows_the_seed(loaded):
    family, pipe, sample = loaded
    assert (_sample(family, pipe, seed=8) - sample).abs().mean() > 1e-2


def test_tokenises_a_prompt_to_several_known_tokens(loaded):
    _, pipe, _ = loaded
    for name, tokenizer in pipe.components.items():
        if not name.startswith("tokenizer") or tokenizer is None:
            continue
        ids = tokenizer(PROMPTS[1], add_special_tokens=False).input_ids
        assert len(set(ids)) > 5, name
        assert tokenizer.unk_token_id not in ids, name


def test_gives_the_template_of_qwen_image_the_length_that_the_pipeline_cuts_off():
    pipe = FAMILIES["qwen_image"].build()
    template = pipe.prompt_template_encode.split("{}")[0]
    assert len(pipe.tokenizer(template).input_ids) == pipe.prompt_template_encode_start_idx


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_builds_the_same_small_weights_whatever_the_global_seed(name):
    weights = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        pipe = FAMILIES[name].build()
        modules = {key: part for key, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
        weights.append({f"{key}.{k}": v for key, part in modules.items() for k, v in part.state_dict().items()})
        assert torch.initial_seed() == seed
    first, second = weights
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert sum(tensor.nbytes for tensor in first.values()) < 5_000_000


def test_what_a_class_leaves_as_it_finds_it_in_memory_is_known_too():
    class Left(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.token = torch.nn.Parameter(torch.empty(64))

    found = []
    for filler in (float("nan"), 1e30):
        held = [torch.full((64,), filler) for _ in range(100)]
        del held  # what comes next gets their memory
        with seeded(3):
            module = Left()
        randomise_module(module, torch.Generator().manual_seed(3))
        found.append(module.token)
    assert torch.equal(*found)
    assert found[0].abs().max() < 1
    assert not torch.are_deterministic_algorithms_enabled()


def test_builds_a_folder_once(folders):
    folder = build_folder("flux", folders)
    written = (folder / "model_index.json").stat().st_mtime_ns
    assert build_folder("flux", folders) == folder
    assert (folder / "model_index.json").stat().st_mtime_ns == written
    assert not list(folders.glob(".*"))
