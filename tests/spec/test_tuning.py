"""A spec with choices as a whole: what `tune` looks for, and what is refused before anything is tried."""

from __future__ import annotations

import json

import pytest

from diffkiln.errors import SpecError
from diffkiln.spec import parse_spec
from diffkiln.spec.tuning import read_tuning

PLAIN = {
    "spec_version": 1,
    "source": {"model": "model"},
    "target": {"device": "cpu"},
    "inputs": {"height": 32, "width": 32, "num_inference_steps": 4},
}
GATE = {"metric": "psnr", "at_least": 30, "prompts": "prompts.txt"}
DTYPES = {"source": {"model": "model", "dtype": {"choose": ["float32", "bfloat16"]}}}


def refusal(**changed) -> str:
    with pytest.raises(SpecError) as caught:
        read_tuning({**PLAIN, **DTYPES, **changed})
    return str(caught.value)


def test_every_plain_spec_is_one(tmp_path):
    file = tmp_path / "spec.json"
    file.write_text(json.dumps({**PLAIN, **DTYPES, "tune": {"objective": "psnr"}, "quality": [GATE]}))
    tuning = read_tuning(file)
    assert tuning.wanted.objective == "psnr"
    dtypes = [parse_spec(tuning.plain({"$.source.dtype": number})).source.dtype for number in (0, 1)]
    assert dtypes == ["float32", "bfloat16"]
    assert "tune" not in tuning.plain({"$.source.dtype": 0})
    assert tuning.first.source.dtype == "float32"


def test_without_a_section_the_fastest_is_looked_for():
    wanted = read_tuning({**PLAIN, **DTYPES}).wanted
    assert (wanted.objective, wanted.limits.latency, wanted.reference) == ("latency", None, None)


def test_a_spec_without_choices_is_refused():
    assert "$: holds no choices, so there is nothing to tune" in refusal(**PLAIN)


@pytest.mark.parametrize(
    ("tune", "words"),
    [
        ({"objectiv": "latency"}, '$.tune.objectiv: there is no such field. Did you mean "objective"?'),
        ({"objective": "ssim"}, '$.tune.objective: "ssim" is not measured. It may be latency, memory, bytes, psnr'),
        ({"limits": {"latency": -1}}, "$.tune.limits.latency: must be greater than 0"),
        ({"limits": {"memory": "much"}}, "$.tune.limits.memory: 'much' is no amount of memory"),
        ({"limits": {"psnr": 3}}, "$.tune.limits.psnr: there is no such field"),
        ({"limits": {"memory": {"choose": [1, 2]}}}, "$.tune: says what is wanted, so it holds no choices"),
        (3, "$.tune: must be an object, not 3"),
    ],
)
def test_a_wrong_section_is_refused_in_a_sentence(tune, words):
    assert words in refusal(tune=tune, quality=[GATE])


def test_an_unknown_field_is_told_once():
    assert refusal(quallity=[]) == '$.quallity: there is no such field. Did you mean "quality"?'


def test_a_value_that_never_makes_a_spec_is_told_with_its_place():
    told = refusal(source={"model": "model", "dtype": {"choose": ["float32", "float31"]}})
    assert told.startswith('$.source.dtype: "float31" is not one of')


def test_values_that_fit_in_other_combinations_alone_are_no_mistake():
    runtime = {
        "cuda_graphs": {"choose": ["step", None]},
        "offload": {"choose": [{"num_blocks_per_group": 1}, None]},
    }
    tuning = read_tuning({**PLAIN, "runtime": runtime})
    assert tuning.first.runtime.cuda_graphs == "step"
    assert tuning.first.runtime.offload is None


def test_a_spec_with_choices_is_no_spec():
    for changed in (DTYPES, {"tune": {}}):
        with pytest.raises(SpecError, match="which writes a plain spec"):
            parse_spec({**PLAIN, **changed})


def test_a_file_that_is_no_object_is_refused(tmp_path):
    file = tmp_path / "spec.json"
    file.write_text("[]")
    with pytest.raises(SpecError, match="must be an object"):
        read_tuning(file)
