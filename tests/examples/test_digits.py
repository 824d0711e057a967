"""The digits example, before compiling: what its folder holds, and whether it draws what it is asked for."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "digits"
MODEL = EXAMPLE / "model"


@pytest.fixture(scope="module", autouse=True)
def example_on_path():
    """The example's files import each other by name, as scripts do."""
    sys.path.insert(0, str(EXAMPLE))
    yield
    sys.path.remove(str(EXAMPLE))
    for name in ("classifier", "evaluate_eager", "styles"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def pipeline(example_on_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        import torch
        from evaluate_eager import load

        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        yield load()
        torch.set_num_threads(threads)


def test_model_folder_is_small():
    assert sum(path.stat().st_size for path in MODEL.rglob("*") if path.is_file()) <= 6_000_000


def test_model_folder_holds_json_and_safetensors_only():
    assert {path.suffix for path in MODEL.rglob("*") if path.is_file()} == {".json", ".safetensors"}


def test_model_folder_has_both_tokenizers_in_portable_form():
    for name in ("tokenizer", "tokenizer_2"):
        assert (MODEL / name / "tokenizer.json").is_file()


def test_pipeline_has_several_instances_of_each_repeated_block(pipeline):
    assert type(pipeline).__name__ == "FluxPipeline"
    assert len(pipeline.transformer.transformer_blocks) >= 2
    assert len(pipeline.transformer.single_transformer_blocks) >= 2


def test_classifier_reads_held_out_digits():
    from classifier import held_out_accuracy

    assert held_out_accuracy() >= 0.95


def test_classifier_takes_pil_uint8_and_float_images(pipeline):
    from classifier import as_digits, requests
    from evaluate_eager import generate

    images = generate(pipeline, requests(1))
    pixels = np.asarray(images[0])
    np.testing.assert_array_equal(as_digits(images), as_digits([pixels]))
    np.testing.assert_allclose(as_digits(images), as_digits(pixels[None] / 255.0), atol=1e-9)


def test_classifier_rejects_sizes_that_do_not_divide():
    from classifier import as_digits

    with pytest.raises(ValueError, match="30 × 32"):
        as_digits(np.zeros((1, 30, 32), dtype=np.uint8))


def test_requests_ask_evenly_for_all_digits():
    from classifier import requests

    wanted = requests(100)
    assert np.bincount([request.digit for request in wanted]).tolist() == [10] * 10
    assert len({request.seed for request in wanted}) == 100


def test_eager_pipeline_draws_the_digits_it_is_asked_for(pipeline):
    from classifier import requests, score
    from evaluate_eager import generate

    wanted = requests(100)
    images = generate(pipeline, wanted, batch=20)
    assert score(images, [request.digit for request in wanted]) >= 0.90


def test_an_image_does_not_depend_on_its_batch(pipeline):
    from classifier import requests
    from evaluate_eager import generate

    wanted = requests(4)
    together, alone = (
        np.asarray([np.asarray(image, dtype=np.int16) for image in generate(pipeline, wanted, batch)])
        for batch in (4, 1)
    )
    assert np.abs(together - alone).max() <= 2


def test_specs_differ_in_quantization_alone():
    plain, int8 = (json.loads((EXAMPLE / name).read_text()) for name in ("spec.json", "spec-int8.json"))
    quantize = [step for step in int8["passes"] if step["name"] == "quantize"]
    assert len(quantize) == 1
    assert plain == {**int8, "passes": [step for step in int8["passes"] if step not in quantize]}


def test_specs_ask_for_the_call_that_is_scored():
    from evaluate_eager import CALL

    inputs = json.loads((EXAMPLE / "spec.json").read_text())["inputs"]
    fixed = {**inputs, **inputs["call"], "batch_size": 1}
    assert {name: fixed[name] for name in CALL} == CALL


def test_its_adapter_makes_digits_lean_and_leaves_no_bit_behind(digits_bundle):
    """On the compiled bundle, whose projections are fused."""
    import torch
    from classifier import requests
    from styles import slant

    import diffkiln

    wanted = requests(20)

    def drawn(pipe) -> np.ndarray:
        made = [
            pipe(item.prompt, generator=torch.Generator("cpu").manual_seed(item.seed), output_type="np").images
            for item in wanted
        ]
        return np.concatenate(made)

    with diffkiln.load(digits_bundle) as pipe:
        before = drawn(pipe)
        pipe.load_lora(EXAMPLE / "lora" / "slanted.safetensors", name="slanted")
        leaning = drawn(pipe)
        pipe.unload_lora("slanted")
        after = drawn(pipe)
    assert abs(np.mean([slant(image) for image in before])) < 0.15
    assert np.mean([slant(image) for image in leaning]) > 0.25
    np.testing.assert_array_equal(before, after)
