"""Gates of quality: what is wrong with them is said before a weight is read."""

from __future__ import annotations

import json

import pytest
import torch

import diffkiln
from diffkiln.errors import SpecError
from tests.conftest import DIGITS
from tests.pipelines import WARNING_FILTERS

pytestmark = [pytest.mark.filterwarnings(text) for text in WARNING_FILTERS]


def spec_with(**gate) -> dict:
    made = json.loads((DIGITS / "spec.json").read_text())
    made["source"]["model"] = str(DIGITS / "model")
    return made | {"quality": [{"metric": "psnr", "at_least": 20, "prompts": "prompts.txt"} | gate]}


@pytest.mark.parametrize(
    ("gate", "told"),
    [
        ({"prompts": "nowhere.txt"}, "$.quality[0].prompts: there is no file of prompts"),
        ({"prompts": "empty.txt"}, "$.quality[0].prompts: the file"),
        ({"prompts": "binary.txt"}, "is no text file"),
        ({"metric": "psnrr"}, "$.quality[0].metric: there is no metric 'psnrr'. Did you mean"),
        ({"metric": "lpips"}, "$.quality[0].metric: lpips needs a backbone, so it cannot be computed"),
        ({"metric": "lpips", "backbone": "nowhere"}, "$.quality[0].backbone: there is no folder"),
        ({"metric": "ms_ssim"}, "ms_ssim cannot be computed: it needs pictures of at least 176 pixels a side"),
        ({"metric": "flicker"}, "flicker cannot be computed: it is of videos"),
        ({"at_most": 3}, '$.quality[0]: needs exactly one of "at_least" and "at_most", and both are given'),
        ({"at_least": None}, "and neither is given"),
        ({"seeds": 0}, "$.quality[0].seeds"),
        ({"floor": 3}, "$.quality[0].floor"),
    ],
)
def test_a_gate_that_cannot_be_computed_is_refused_before_a_weight_is_read(tmp_path, monkeypatch, gate, told):
    def load(*_: object) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr("diffkiln.models.meta._loaded", load)
    (tmp_path / "prompts.txt").write_text("seven\n")
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(SpecError) as caught:
        diffkiln.check(spec_with(**gate), base=tmp_path)
    assert told in str(caught.value)


def test_several_are_told_together(tmp_path):
    made = spec_with(prompts="nowhere.txt")
    made["quality"].append({"metric": "ms_ssimm", "at_least": 0.9, "prompts": "nowhere.txt"})
    with pytest.raises(SpecError) as caught:
        diffkiln.check(made, base=tmp_path)
    assert [problem.where for problem in caught.value.problems] == [
        "$.quality[0].prompts",
        "$.quality[1].prompts",
        "$.quality[1].metric",
    ]


def test_a_gate_is_pinned_without_the_path_of_its_prompts(tmp_path):
    (tmp_path / "prompts.txt").write_text("seven\nnine\n")
    (gate,) = diffkiln.check(spec_with(seeds=2), base=tmp_path).gates
    assert gate.prompts == ("seven", "seven", "nine", "nine")
    assert gate.seeds == (0, 1, 0, 1)
    pinned = gate.pinned()
    assert pinned["prompts"].startswith("sha256:")
    assert gate.words == "psnr at least 20"
    assert gate.keeps(20)
    assert not gate.keeps(19.9)


def test_a_metric_of_the_caller_looks_at_one_side(tmp_path):
    from diffkiln.compiler.check import check_with

    (tmp_path / "prompts.txt").write_text("seven\n")
    (gate,) = check_with(spec_with(metric="brightness"), tmp_path, ["brightness"]).gates
    half = [torch.full((1, 3, 4, 4), 0.5)]
    assert gate.measured(half, half, {"brightness": lambda images, prompts: images.mean()}) == 0.5
