"""calibrate: the steps it chooses on the digits pipeline, the evidence, and what a wrong spec is told."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
import torch

import diffkiln
from diffkiln.errors import BuildError, IllegalPlan, SourceError, SpecError
from diffkiln.passes.caching import cheapest, evenly, symbols
from tests.conftest import DIGITS
from tests.pipelines import WARNING_FILTERS

pytestmark = [pytest.mark.filterwarnings(text) for text in WARNING_FILTERS]
SCHEDULE = {"name": "cache_schedule", "component": "transformer", "method": "fora", "steps": "calibrated"}
CALIBRATE = {"name": "calibrate", "component": "transformer", "prompts": "prompts.txt", "tried": 3}
PROMPTS = "a handwritten seven\n\n  a handwritten three\n"


@pytest.fixture(autouse=True)
def prompts(tmp_path):
    (tmp_path / "prompts.txt").write_text(PROMPTS)


def spec(*passes: dict[str, Any], **more: Any) -> dict[str, Any]:
    made = json.loads((DIGITS / "spec.json").read_text())
    made["source"]["model"] = str(DIGITS / "model")
    return {**made, "passes": list(passes), "runtime": {}, **more}


def evidence(path) -> dict[str, Any]:
    return json.loads((path / "calibration" / "transformer.json").read_text())


def test_a_budget_gives_that_many_steps_and_the_evidence(tmp_path):
    built = diffkiln.compile(spec(CALIBRATE | {"computed": 4}, SCHEDULE), tmp_path / "bundle", base=tmp_path)
    found = evidence(built.path)
    assert (len(found["steps"]), sum(found["steps"]), found["steps"][0]) == (8, 4, 1)
    assert found["prompts"].startswith("sha256:")
    assert found["count"] == 2
    tried = {tuple(row["steps"]): row["metric"] for row in found["tried"]}
    assert tried[tuple(found["steps"])] == max(tried.values())
    assert (1, 0, 1, 0, 1, 0, 1, 0) in tried
    costs = found["costs"]
    assert all(costs[kept][step] == 0 for kept in range(8) for step in range(kept + 1))
    assert all(costs[kept][kept + 2] > costs[kept][kept + 1] > 0 for kept in range(6))
    with diffkiln.load(built.path) as pipe:
        rows = [row.options for row in pipe.bundle.manifest.passes]
    assert rows[1]["steps"] == tuple(found["steps"]) or list(rows[1]["steps"]) == found["steps"]
    assert json.loads((built.path / "spec.json").read_text())["passes"][1]["steps"] == "calibrated"


def test_the_same_inputs_give_the_same_bundle(tmp_path):
    made = spec(CALIBRATE | {"computed": 3, "tried": 1}, SCHEDULE)
    one, two = (diffkiln.compile(made, tmp_path / name, base=tmp_path).id for name in ("one", "two"))
    assert one == two


def test_a_floor_gives_the_fewest_steps_that_keep_it(tmp_path):
    made = spec(CALIBRATE | {"at_least": 30.0, "tried": 1}, SCHEDULE)
    built = diffkiln.compile(made, tmp_path / "bundle", base=tmp_path)
    tried = {tuple(row["steps"]): row["metric"] for row in evidence(built.path)["tried"]}
    chosen = tuple(evidence(built.path)["steps"])
    assert tried[chosen] >= 30.0
    assert all(value < 30.0 for mask, value in tried.items() if sum(mask) < sum(chosen))


def test_a_metric_of_ones_own_decides(tmp_path):
    asked: list[tuple[int, ...]] = []

    def darkest(images: torch.Tensor, prompts: Any) -> float:
        assert list(prompts) == ["a handwritten seven", "a handwritten three"]
        assert 0.0 <= float(images.min()) <= float(images.max()) <= 1.0
        asked.append(tuple(images.shape))
        return -float(images.mean())

    made = spec(CALIBRATE | {"computed": 2, "metric": "darkest"}, SCHEDULE)
    built = diffkiln.compile(made, tmp_path / "bundle", base=tmp_path, metrics={"darkest": darkest})
    assert set(asked) == {(2, 3, 32, 32)}
    assert len(asked) == len(evidence(built.path)["tried"])
    with pytest.raises(SpecError, match="no metric 'darkest', only psnr"):
        diffkiln.compile(made, tmp_path / "again", base=tmp_path)
    assert not (tmp_path / "again").exists()


def test_a_floor_that_no_schedule_keeps_is_told_with_the_best(tmp_path):
    made = spec(CALIBRATE | {"at_least": 99.0}, SCHEDULE)
    with pytest.raises(BuildError, match=r"psnr stays below 99 for every schedule that reuses a step \(the best gave"):
        diffkiln.compile(made, tmp_path / "bundle", base=tmp_path)
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize("computed", [1, 2, 3, 4, 5])
def test_dynamic_programming_finds_what_trying_all_finds(computed):
    generator = torch.Generator().manual_seed(computed)
    costs = torch.rand(6, 6, generator=generator).triu(1).cumsum(1).triu(1).tolist()

    def cost(steps: tuple[int, ...]) -> float:
        return sum(costs[a][b - 1] for a, b in zip(steps, (*steps[1:], 6), strict=True))

    ways = sorted(((0, *rest) for rest in itertools.combinations(range(1, 6), computed - 1)), key=cost)
    found = [tuple(index for index, computes in enumerate(mask) if computes) for mask in cheapest(costs, computed, 3)]
    assert found == ways[:3]


@pytest.mark.parametrize(("computed", "wanted"), [(1, "●○○○○○○○"), (3, "●○●○○●○○"), (4, "●○●○●○●○"), (8, "●●●●●●●●")])
def test_even_distances(computed, wanted):
    assert symbols(evenly(8, computed)) == wanted


@pytest.mark.parametrize(
    ("options", "where"),
    [
        ({}, "computed"),
        ({"computed": 3, "at_least": 30.0}, "at_least"),
        ({"computed": 0}, "computed"),
        ({"computed": 3, "tried": 0}, "tried"),
    ],
)
def test_wrong_options_are_refused_by_path(options, where, tmp_path):
    with pytest.raises(SpecError, match=rf"\$\.passes\[0\]\.{where}"):
        diffkiln.check(spec(CALIBRATE | options, SCHEDULE), base=tmp_path)


VARIANTS = [{"height": 32, "width": 32, "num_inference_steps": n, "guidance_scale": 1.0} for n in (8, 4)]
ILLEGAL: dict[str, tuple[dict[str, Any], str, str]] = {
    "nothing follows": (spec(CALIBRATE | {"computed": 4}), "$.passes[0]", "no cache_schedule of the component"),
    "nothing reuses": (spec(CALIBRATE | {"computed": 8}, SCHEDULE), "$.passes[0].computed", "none reuses"),
    "nothing calibrates": (spec(SCHEDULE), "$.passes[0].steps", "no calibrate of the component"),
    "not the denoiser": (
        spec(CALIBRATE | {"component": "vae", "computed": 4}, SCHEDULE | {"method": "mask", "component": "vae"}),
        "$.passes[0]",
        "not a part of the denoising run",
    ),
    "an interval beside it": (
        spec(CALIBRATE | {"computed": 4}, {**SCHEDULE, "steps": None, "interval": 2}),
        "$.passes[1].steps",
        "calibrate chooses them",
    ),
    "an extrapolation": (
        spec(CALIBRATE | {"computed": 4}, SCHEDULE | {"method": "taylorseer", "order": 1}),
        "$.passes[1].order",
        "not for an extrapolation",
    ),
    "ratios": (
        spec(CALIBRATE | {"computed": 4}, {**SCHEDULE, "steps": None, "method": "magcache", "ratios": [1.0] * 8}),
        "$.passes[1].method",
        "has none to choose",
    ),
    "a dynamic criterion": (
        spec(
            CALIBRATE | {"computed": 4},
            {**SCHEDULE, "steps": None, "method": "first_block", "dynamic": True, "threshold": 0.1},
        ),
        "$.passes[1].method",
        "has none to choose",
    ),
    "two numbers of steps": (
        spec(CALIBRATE | {"computed": 3}, SCHEDULE, inputs=VARIANTS), "$.passes[0]", "one number of steps",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ILLEGAL)
def test_what_cannot_be_calibrated_is_refused_by_path(name, tmp_path):
    made, where, reason = ILLEGAL[name]
    with pytest.raises(IllegalPlan) as caught:
        diffkiln.check(made, base=tmp_path)
    problems = {problem.where: problem.reason for problem in caught.value.problems}
    assert reason in problems[where]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (None, r"there is no file of prompts .*prompts\.txt"),
        ("", r"the file .*prompts\.txt holds no prompt"),
        ("\n \n", r"the file .*prompts\.txt holds no prompt"),
        (b"\xff\xfe", r"prompts\.txt is no text file in UTF-8"),
    ],
)
def test_a_prompts_file_that_is_none_is_told(text, told, tmp_path):
    file = tmp_path / "prompts.txt"
    file.unlink()
    if text is not None:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(SourceError, match=told):
        diffkiln.check(spec(CALIBRATE | {"computed": 4}, SCHEDULE), base=tmp_path)
