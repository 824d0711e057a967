"""What `evaluate` finds between bundles and the pipeline that they were made from, and what it refuses."""

from __future__ import annotations

import json

import pytest
import torch

from diffkiln.cli import main
from diffkiln.errors import CallError, SourceError, SpecError
from diffkiln.evaluate.album import Album, Drawn
from diffkiln.evaluate.calls import Call
from diffkiln.evaluate.comparing import drift_of
from diffkiln.evaluate.quality import Comparison, evaluate, evaluated
from diffkiln.evaluate.ways import Asked
from tests.conftest import DIGITS
from tests.pipelines import WARNING_FILTERS

pytestmark = [pytest.mark.filterwarnings(text) for text in WARNING_FILTERS]
PROMPTS = ["a handwritten seven", "three"]


def brightness(images, prompts):
    """A metric of one side: a number for each picture."""
    return [float(image.mean()) for image in images]


def distance(images, references, prompts):
    """A metric of both sides: one number."""
    return float((images - references).abs().max())


def wrong(images, prompts):
    return "no number"


@pytest.fixture(scope="module")
def kept(digits_int8_bundle, tmp_path_factory):
    """int8 weights against eager float32, with pictures that stay."""
    folder = tmp_path_factory.mktemp("evaluation") / "kept"
    metrics = ("psnr", "ssim", f"{__name__}:brightness", f"{__name__}:distance")
    given = {"seeds": 2, "metrics": metrics, "source": DIGITS / "model", "keep": folder}
    return evaluate(digits_int8_bundle, "eager", PROMPTS, **given), given


@pytest.mark.slow
class TestAgainstEager:
    def test_metrics_of_each_picture_and_of_all(self, kept):
        rows = {row.name.rpartition(":")[2]: row for row in kept[0].rows}
        assert 40 < rows["psnr"].score.overall < 80
        assert len(rows["psnr"].score.each) == 4
        assert 0.99 < rows["ssim"].score.overall < 1
        assert rows["brightness"].score.reference == pytest.approx(rows["brightness"].score.overall, abs=0.01)
        assert rows["brightness"].score.reference != rows["brightness"].score.overall
        assert 0 < rows["distance"].score.overall < 0.2

    def test_the_noise_of_another_attention_is_far_below_the_loss(self, kept):
        found = kept[0]
        assert len(found.drift) == len(found.floor) == 8
        assert found.drift[-1].relative > found.drift[0].relative
        assert all(
            noise.relative < 0.01 * drift.relative for noise, drift in zip(found.floor, found.drift, strict=True)
        )
        assert found.rows[0].floor > found.rows[0].score.overall

    def test_a_second_run_goes_on_from_what_is_there(self, kept, digits_int8_bundle):
        found, given = kept
        missing = given["keep"] / "reference" / "00002.npz"
        missing.unlink()
        told = []
        again = evaluate(digits_int8_bundle, "eager", PROMPTS, **given, progress=told.append)
        assert [line for line in told if line.startswith("draw")] == ["draw 3 of 4: eager diffusers"]
        assert [row.as_json() for row in again.rows] == [row.as_json() for row in found.rows]

    def test_the_folder_of_another_evaluation_is_left_alone(self, kept, digits_int8_bundle):
        with pytest.raises(SpecError, match="holds the images of another evaluation"):
            evaluate(digits_int8_bundle, "eager", ["nine"], **kept[1])

    def test_everything_is_json(self, kept):
        told = kept[0].as_json()
        assert json.loads(json.dumps(told)) == told


@pytest.mark.slow
def test_two_bundles_and_what_cannot_be_measured(digits_bundle, digits_int8_bundle, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("seven\n\nnine\n")
    words = ["evaluate", str(digits_int8_bundle), "--against", str(digits_bundle), "--prompts", str(prompts)]
    assert main([*words, "--json", str(tmp_path / "found.json")]) == 0
    told = capsys.readouterr().out
    *lines, written = told.splitlines()
    assert max(map(len, lines)) <= 80
    assert written == str(tmp_path / "found.json")
    assert "ms_ssim: not measured; needs pictures of at least 176 pixels a side" in told
    assert "clip_score: not measured; needs a backbone: --backbone clip=FOLDER" in told
    found = json.loads((tmp_path / "found.json").read_text())
    rows = {row["name"]: row for row in found["metrics"]}
    assert rows["lpips"]["overall"] is None
    assert rows["psnr"]["overall"] > 40
    assert found["floor_drift"] is None


# -- wrong input: nothing is loaded --


@pytest.fixture
def unloaded(monkeypatch):
    def load(*_: object) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr("diffkiln.evaluate.drawing.open_way", load)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ("nowhere.txt", "there is no file of prompts nowhere.txt"),
        ("empty.txt", "holds no prompt: every line is empty"),
        ("binary.txt", "is no text file in UTF-8"),
        (".", "is no text file in UTF-8"),
    ],
)
def test_prompts_that_are_none(digits_bundle, unloaded, tmp_path, monkeypatch, capsys, prompts, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text(" \n\n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    assert main(["evaluate", str(digits_bundle), "--against", str(digits_bundle), "--prompts", prompts]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"metrics": ["psnrr"]}, "there is no metric 'psnrr'. Did you mean"),
        ({"metrics": ["clip_score"]}, "clip_score needs a backbone: --backbone clip=FOLDER"),
        ({"metrics": ["clip_score"], "backbones": ["clip=nowhere"]}, "there is no folder nowhere"),
        ({"metrics": ["ms_ssim"]}, "ms_ssim needs pictures of at least 176 pixels"),
        ({"metrics": ["flicker"]}, "flicker is of videos"),
        ({"metrics": ["no_module:f"]}, "there is no module no_module"),
        ({"metrics": ["json:f"]}, "json has no f"),
        ({"metrics": ["math:pi"]}, "is no function, but float"),
        ({"backbones": ["eye=."]}, "KIND is one of clip, vgg16"),
        ({"seeds": 0}, "0 seeds draw nothing"),
    ],
)
def test_what_cannot_be_measured_is_said_before_a_weight_is_read(digits_bundle, unloaded, given, message):
    with pytest.raises(SpecError) as caught:
        evaluate(digits_bundle, str(digits_bundle), PROMPTS, **given)
    assert message in str(caught.value)


def test_an_empty_prompt_in_a_list(digits_bundle, unloaded):
    with pytest.raises(SpecError, match="one is empty"):
        evaluate(digits_bundle, str(digits_bundle), ["a", " "])


def test_a_way_that_is_no_reference(digits_bundle, unloaded):
    with pytest.raises(SpecError, match="--against compile is for bench"):
        evaluate(digits_bundle, "compile", PROMPTS)


def test_a_folder_of_something_else_is_left_alone(digits_bundle, unloaded, tmp_path):
    (tmp_path / "mine").write_text("")
    with pytest.raises(SpecError, match="is not empty, and holds no evaluation"):
        evaluate(digits_bundle, str(digits_bundle), PROMPTS, keep=tmp_path)


def test_a_bundle_that_takes_images_is_refused(digits_bundle, unloaded, monkeypatch):
    call = Call(("prompt",), fixed={"height": 32, "width": 32}, declared={"image": {"height": 32, "width": 32}})
    monkeypatch.setattr("diffkiln.evaluate.ways.call_of", lambda _: call)
    with pytest.raises(CallError, match="takes image besides prompts"):
        evaluate(digits_bundle, str(digits_bundle), PROMPTS)


def test_an_unknown_source_is_asked_for(digits_bundle, unloaded, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    with pytest.raises(SourceError, match="--source"):
        evaluate(digits_bundle, "eager", PROMPTS)


@pytest.mark.slow
def test_a_metric_of_the_user_that_gives_no_number(digits_bundle):
    comparison = Comparison(str(digits_bundle), metrics=(f"{__name__}:wrong",))
    with (
        pytest.raises(CallError, match="gives no number, nor one for each picture"),
        evaluated(digits_bundle, comparison, ["seven"], None, Asked(), lambda _: None),
    ):
        raise AssertionError


# -- albums --


def test_drift_of_equal_latents_is_none_and_of_opposite_ones_is_all(tmp_path):
    ours, theirs = Album(tmp_path / "a"), Album(tmp_path / "b")
    latents, picture = torch.stack([torch.ones(4), torch.ones(4)]), torch.zeros(1, 3, 8, 8)
    ours.put(0, Drawn(picture, latents, 1.0))
    theirs.put(0, Drawn(picture, latents * torch.tensor([[1.0], [-1.0]]), 1.0))
    same, opposite = drift_of(ours, theirs, 1)
    assert (same.relative, same.cosine) == (0, pytest.approx(1))
    assert (opposite.relative, opposite.cosine) == (2, pytest.approx(-1))


def test_steps_that_are_not_alike_have_no_drift(tmp_path):
    ours, theirs = Album(tmp_path / "a"), Album(tmp_path / "b")
    for album, steps in ((ours, 2), (theirs, 3)):
        album.put(0, Drawn(torch.zeros(1, 3, 8, 8), torch.ones(steps, 4), 1.0))
    assert drift_of(ours, theirs, 1) == []


def test_a_picture_that_is_broken_is_named(tmp_path):
    album = Album(tmp_path)
    album.put(0, Drawn(torch.zeros(1, 3, 8, 8), torch.empty(0), 1.0))
    (tmp_path / "00000.npz").write_bytes(b"PK")
    with pytest.raises(SpecError, match="cannot be read"):
        album.get(0)
