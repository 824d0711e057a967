"""Pipelines whose shapes follow the prompt's length, with a variant for each length that the spec names."""

import pytest

import diffkiln
from diffkiln.errors import CallError, DataDependent, SpecError
from diffkiln.interpreter.quiet import quiet_libraries
from tests.coverage.calls import CALLS
from tests.coverage.calls.measure import REQUESTS, TOLERANCE, spec_of
from tests.families.test_fixed_lengths import difference
from tests.pipelines import WARNING_FILTERS

pytestmark = [pytest.mark.filterwarnings(text) for text in WARNING_FILTERS]

FAMILY = "dream_lite"
SHORT, LONG = (prompt for _, prompt in REQUESTS)
OTHER = "a red fox in the snow"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A tiny pipeline's spec, and the number of tokens of a prompt."""
    root = tmp_path_factory.mktemp(FAMILY)
    with quiet_libraries():
        pipe = CALLS[FAMILY].build()
        pipe.save_pretrained(root / "model", safe_serialization=True)
    tokenizer = getattr(pipe, "processor", None) or pipe.tokenizer
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)

    def count(text):
        return len(tokenizer(text).input_ids) - len(tokenizer("").input_ids)

    return spec_of(CALLS[FAMILY], root / "model"), count, root


@pytest.fixture(scope="module")
def both(saved):
    """diffusers' own pipeline, the compiled one, and the keywords of both."""
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    spec, count, root = saved
    # Beside the pipeline's own text a prompt may have a token less than alone.
    lengths = {"prompt_tokens": sorted({count(text) - less for text in (SHORT, LONG) for less in (0, 1)})}
    built = diffkiln.compile(spec | {"inputs": spec["inputs"] | lengths}, root / "bundle")
    with quiet_libraries():
        reference = DiffusionPipeline.from_pretrained(root / "model")
    reference.set_progress_bar_config(disable=True)
    given = {key: value for key, value in spec["inputs"].items() if key != "call"} | spec["inputs"]["call"]
    with diffkiln.load(built.path) as pipe:
        yield reference, pipe, given


@pytest.mark.parametrize("prompt", [SHORT, LONG])
def test_equals_diffusers_for_prompts_of_each_length(both, prompt):
    assert difference(*both, prompt=prompt) <= TOLERANCE


def test_a_prompt_of_another_length_is_refused_with_the_lengths_that_there_are(both, saved):
    _, pipe, given = both
    told = rf"prompt: \d+ tokens. The bundle takes .*{saved[1](LONG)}. Add \d+ to 'prompt_tokens'"
    with pytest.raises(CallError, match=told):
        pipe(prompt=OTHER, **given)


def test_a_negative_prompt_is_refused_where_its_length_is_not_said(both):
    _, pipe, given = both
    with pytest.raises(CallError, match='Add "negative_prompt_tokens"'):
        pipe(prompt=SHORT, negative_prompt=LONG, **given)


def test_without_lengths_the_error_says_what_to_write(saved):
    spec, _, root = saved
    with pytest.raises(DataDependent, match='say how many tokens prompts have: "prompt_tokens" in "inputs"'):
        diffkiln.compile(spec, root / "none")


@pytest.mark.parametrize(
    ("lengths", "told"),
    [
        ({"negative_prompt_tokens": 3}, "stands beside prompt_tokens alone"),
        ({"prompt_tokens": list(range(1, 30)), "negative_prompt_tokens": list(range(10))}, "256 are the most"),
        ({"prompt_tokens": [3, 3]}, "repeats"),
        ({"prompt_tokens": -1}, "prompt_tokens"),
    ],
)
def test_lengths_that_make_no_sense_are_refused(saved, lengths, told):
    spec, _, _ = saved
    with pytest.raises(SpecError, match=told):
        diffkiln.check(spec | {"inputs": spec["inputs"] | lengths})


def test_lengths_are_refused_where_every_prompt_is_padded(tmp_path):
    with quiet_libraries():
        CALLS["sd"].build().save_pretrained(tmp_path / "model", safe_serialization=True)
    spec = spec_of(CALLS["sd"], tmp_path / "model")
    spec["inputs"] |= {"prompt_tokens": 5}
    with pytest.raises(SpecError, match=r"\$\.inputs\.prompt_tokens: every prompt is padded .*Remove it"):
        diffkiln.compile(spec, tmp_path / "bundle")
