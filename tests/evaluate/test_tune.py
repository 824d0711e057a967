"""`tune` as a user has it: trials that are built and measured, refused or missed; a process that is killed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from diffkiln.cli import main
from diffkiln.errors import IllegalPlan, OutputBusy, QualityError, SpecError
from diffkiln.evaluate.trials import Goal, Outcome
from diffkiln.evaluate.tune import tune
from diffkiln.spec import parse_spec
from diffkiln.spec.tuning import Limits
from tests.conftest import DIGITS
from tests.pipelines import WARNING_FILTERS

pytestmark = [pytest.mark.filterwarnings(text) for text in WARNING_FILTERS]
FORA = {"name": "cache_schedule", "component": "transformer", "method": "fora", "interval": 2}
#: Illegal where there are two steps: it names three.
ILLEGAL = {"name": "cache_schedule", "component": "transformer", "method": "mask", "steps": [1, 0, 1]}
GATE = {"metric": "psnr", "at_least": 35, "prompts": "prompts.txt"}


def write(folder: Path, **changed) -> Path:
    """The digits pipeline with two steps and nothing compiled, so that a trial takes seconds."""
    spec = json.loads((DIGITS / "spec.json").read_text())
    spec |= {"source": {"model": str(DIGITS / "model")}, "passes": [], "runtime": {}}
    spec["inputs"]["num_inference_steps"] = 2
    folder.mkdir(exist_ok=True)
    (folder / "prompts.txt").write_text("a handwritten seven\nthree\n")
    file = folder / "spec.json"
    file.write_text(json.dumps(spec | changed))
    return file


@pytest.fixture(scope="module")
def killed_and_tuned(tmp_path_factory):
    """Without a schedule; with one that costs too much, in which the process is killed; with one that is illegal."""
    folder = tmp_path_factory.mktemp("tuned")
    file = write(folder, passes=[{"choose": [None, FORA, ILLEGAL]}], quality=[GATE], tune={"limits": {"memory": 9e9}})
    command = [sys.executable, "-m", "diffkiln", "tune", str(file), "-o", str(folder / "out")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("trial 2"):
                time.sleep(1)  # it is building
                process.send_signal(signal.SIGKILL)
                break
    said: list[str] = []
    return process.returncode, tune(file, folder / "out", progress=said.append), said


@pytest.fixture
def tuned(killed_and_tuned):
    return killed_and_tuned[1]


@pytest.mark.more
class TestTuned:
    def test_a_tuning_that_was_killed_goes_on_with_the_trial_that_was_running(self, killed_and_tuned):
        code, tuned, said = killed_and_tuned
        assert code == -signal.SIGKILL
        assert [line.partition(":")[0] for line in said if line.startswith("trial")] == ["trial 2", "trial 3"]
        assert len(tuned.trials) == 3

    def test_each_trial_ends_as_it_should(self, tuned):
        ends = [trial.outcome.end for trial in tuned.trials]
        assert ends == ["kept", "missed", "refused"]
        assert tuned.best.number == 1
        assert tuned.unbeaten == (1,)
        kept, missed, refused = (trial.outcome for trial in tuned.trials)
        assert kept.measures["psnr"] > 100
        assert missed.measures["psnr"] < 35
        assert missed.reason.startswith("psnr is ")
        assert "names 3 steps" in refused.reason
        assert not refused.measures

    def test_costs_are_measured(self, tuned):
        for trial in tuned.trials[:2]:
            assert 0 < trial.outcome.measures["latency"] < 60
            assert 1e8 < trial.outcome.measures["memory"] < 9e9
            assert 5e6 < trial.outcome.measures["bytes"] < 6e6

    def test_the_best_plain_spec_lies_beside_the_spec_and_keeps_its_gates(self, tuned):
        spec = parse_spec(tuned.path)
        assert tuned.path.name == "spec-tuned.json"
        assert spec.passes == ()
        assert [gate.metric for gate in spec.quality or ()] == ["psnr"]

    def test_another_call_measures_nothing_again(self, tuned, capsys):
        folder = tuned.path.parent
        assert main(["tune", str(folder / "spec.json"), "-o", str(folder / "out")]) == 0
        told = capsys.readouterr()
        assert "trial" not in told.err
        assert "build" not in told.err
        assert "3 of 3 combinations; best latency: 1" in told.out
        assert not [line for line in told.out.splitlines() if len(line) > 80 and not line.startswith("/")]
        page = (folder / "out" / "report.html").read_text()
        for words in ("<svg", "names 3 steps", "psnr at least 35, on 2 pictures", "default-src 'none'"):
            assert words in page, words

    def test_json_has_everything(self, tuned, capsys):
        folder = tuned.path.parent
        assert main(["tune", str(folder / "spec.json"), "-o", str(folder / "out"), "--json"]) == 0
        made = json.loads(capsys.readouterr().out)
        assert made["best"] == 1
        assert [trial["chosen"]["$.passes[0]"] for trial in made["trials"]] == [None, FORA, ILLEGAL]
        assert made["trials"][0]["unbeaten"]

    def test_a_folder_with_other_trials_is_refused(self, tuned, tmp_path):
        file = write(tmp_path / "other", passes=[{"choose": [None, FORA]}])
        with pytest.raises(SpecError, match="holds the trials of another spec, machine or version"):
            tune(file, tuned.path.parent / "out")

    def test_two_processes_do_not_share_a_folder(self, tuned):
        from filelock import FileLock

        folder = tuned.path.parent
        with FileLock(folder / "out" / ".lock"), pytest.raises(OutputBusy, match="another process is tuning"):
            tune(folder / "spec.json", folder / "out")


def test_nothing_is_built_where_configuration_tells_that_it_does_not_fit(tmp_path):
    file = write(tmp_path, passes=[{"choose": [None, FORA]}], tune={"limits": {"bytes": 4e6}})
    with pytest.raises(IllegalPlan, match="every trial was refused before it was built, 2 in all") as caught:
        tune(file, tmp_path / "out")
    assert "its weights are" in str(caught.value)
    assert not (tmp_path / "out" / "bundle").exists()
    assert not (tmp_path / "spec-tuned.json").exists()


def test_weights_that_stay_in_memory_do_not_fit_into_less(tmp_path):
    file = write(tmp_path, passes=[{"choose": [None, FORA]}], tune={"limits": {"memory": 4e6}})
    with pytest.raises(IllegalPlan, match="all stay in memory, and the limit is 4e"):
        tune(file, tmp_path / "out")


def test_a_gpu_that_is_not_there_is_told_before_anything_is_built(tmp_path, monkeypatch):
    monkeypatch.setattr("diffkiln.evaluate.trials.available", lambda: False)
    target = {"device": "cuda", "gpu": {"choose": ["nvidia-l4", "nvidia-h200"]}}
    with pytest.raises(IllegalPlan, match="has no GPU for nvidia-l4"):
        tune(write(tmp_path, target=target), tmp_path / "out")


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({}, "holds no choices"),
        ({"passes": [{"choose": [None, FORA | {"metod": 1}]}]}, "fora has no option metod"),
        ({"passes": [{"choose": [None, FORA]}], "quality": [GATE | {"metric": "lpips"}]}, "lpips needs a backbone"),
        ({"passes": [{"choose": [None, FORA]}], "quality": [GATE | {"prompts": "no"}]}, "there is no file of prompts"),
        ({"passes": [{"choose": [None, FORA]}], "tune": {"reference": "no"}}, "$.tune.reference: there is no bundle"),
    ],
)
def test_what_is_wrong_is_told_before_a_folder_is_made(changed, words, tmp_path, capsys):
    assert main(["tune", str(write(tmp_path, **changed)), "-o", str(tmp_path / "out")]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_file_that_would_be_overwritten_stays(tmp_path):
    file = write(tmp_path, passes=[{"choose": [None, FORA]}])
    (tmp_path / "spec-tuned.json").write_text("mine")
    with pytest.raises(SpecError, match=r"spec-tuned\.json is there already"):
        tune(file, tmp_path / "out")
    assert (tmp_path / "spec-tuned.json").read_text() == "mine"


def test_a_folder_of_something_else_is_refused(tmp_path):
    file = write(tmp_path, passes=[{"choose": [None, FORA]}])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "letter").write_text("mine")
    with pytest.raises(SpecError, match="is not empty, and holds no tuning"):
        tune(file, tmp_path / "out")


@pytest.fixture
def outcomes(monkeypatch):
    """What trials come to, without building any."""
    waiting: list[Outcome] = []
    monkeypatch.setattr("diffkiln.evaluate.tune.Workshop.outcome", lambda *_: waiting.pop(0))
    return waiting


def test_the_best_trial_within_the_limits_wins_and_more_trials_may_follow(tmp_path, outcomes):
    file = write(tmp_path, passes=[{"choose": [None, FORA, ILLEGAL]}])
    outcomes += [Outcome("kept", {"latency": 2.0}), Outcome("missed", {"latency": 0.1}, "why")]
    assert tune(file, tmp_path / "out", trials=2).best.number == 1
    outcomes += [Outcome("kept", {"latency": 1.0})]
    found = tune(file, tmp_path / "out", trials=3)
    assert len(found.trials) == 3
    assert found.best.number == 3
    chosen = found.choices[0].values[found.best.picks["$.passes[0]"]]
    assert json.loads(found.path.read_text())["passes"] == ([chosen] if chosen else [])


def test_what_is_printed_fits_80_columns_and_a_page_has_the_same(tmp_path, outcomes, capsys):
    file = write(tmp_path, passes=[{"choose": [None, FORA, ILLEGAL]}], quality=[GATE], tune={"limits": {"latency": 9}})
    costs = {"latency": 2.0, "memory": 3e8, "bytes": 5e6}
    outcomes += [
        Outcome("kept", costs | {"psnr": 120.0}),
        Outcome("missed", costs | {"psnr": 30.0}, "psnr is 30, and …"),
    ]
    outcomes += [Outcome("refused", reason="<b>no room</b> " * 9)]
    arguments = ["tune", str(file), "-o", str(tmp_path / "out")]
    assert main(arguments) == 0
    told = capsys.readouterr()
    assert not [line for line in told.out.splitlines() if len(line) > 80 and not line.startswith("/")]
    for words in ("2000 ms", "300 MB", "5 MB", "best", "missed", "refused", "3 of 3 combinations; best latency: 1"):
        assert words in told.out, words
    page = (tmp_path / "out" / "report.html").read_text()
    for words in ("<svg", "psnr at least 35, on 2 pictures", "latency at most 9000 ms", "default-src 'none'"):
        assert words in page, words
    assert "<b>no room" not in page
    assert main([*arguments, "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["best"] == 1
    assert [trial["end"] for trial in made["trials"]] == ["kept", "missed", "refused"]


def test_no_trial_within_the_limits_is_an_error_that_says_how_they_ended(tmp_path, outcomes):
    outcomes += [Outcome("missed", {"latency": 2.0}, "latency is 2, and 1 at most is asked for"), Outcome("failed")]
    with pytest.raises(QualityError, match=r"no trial keeps the limits: 1 missed, 1 failed\. The first: latency is 2"):
        tune(write(tmp_path, passes=[{"choose": [None, FORA]}]), tmp_path / "out")


def test_after_the_timeout_no_trial_begins(tmp_path, outcomes):
    file = write(tmp_path, passes=[{"choose": [None, FORA]}])
    with pytest.raises(SpecError, match="no trial ended before the timeout"):
        tune(file, tmp_path / "out", timeout=1e-9)
    with pytest.raises(SpecError, match="0 trials try nothing"):
        tune(file, tmp_path / "out", trials=0)


@pytest.mark.parametrize(
    ("measures", "words"),
    [
        ({"latency": 0.5, "memory": 1.0, "bytes": 1.0}, ""),
        ({"latency": 2.0, "memory": 1.0, "bytes": 3.0}, "latency is 2, and 1 at most is asked for; bytes is 3"),
        ({"latency": 0.5, "bytes": 1.0}, "memory cannot be measured here"),
    ],
)
def test_limits_that_are_missed_are_told(measures, words):
    goal = Goal(Limits(latency=1.0, memory=2.0, bytes=2.0), {}, "latency")
    assert goal.missed(measures).startswith(words)
    assert bool(goal.missed(measures)) == bool(words)


@pytest.mark.more
def test_against_a_bundle_fewer_steps_lose_quality(tmp_path, digits_bundle):
    """The pipeline without passes draws with the steps of each trial, so it would lose nothing."""
    inputs = json.loads((DIGITS / "spec.json").read_text())["inputs"]
    steps = inputs | {"num_inference_steps": {"choose": [3, 8]}}
    file = write(tmp_path, inputs=steps, quality=[GATE], tune={"reference": str(digits_bundle), "objective": "psnr"})
    found = tune(file, tmp_path / "out")
    assert [trial.outcome.end for trial in found.trials] == ["missed", "kept"]
    assert found.best.outcome.measures["psnr"] > 60
