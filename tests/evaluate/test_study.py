"""Which combination is tried next, and what is left of a study whose process died."""

from __future__ import annotations

import pytest

from diffkiln.evaluate.study import Trials, opened
from diffkiln.evaluate.trials import Goal, Outcome
from diffkiln.evaluate.tune import unbeaten
from diffkiln.spec.choices import choices_of, count
from diffkiln.spec.tuning import Limits, Tune, Tuning

DATA = {
    "a": {"choose": {"from": 1, "to": 9}},
    "b": {"choose": ["x", {"c": {"choose": ["y", "z"]}}]},
}
GOAL = Goal(Limits(), {}, "latency")


def tuning(data) -> Tuning:
    return Tuning(data, choices_of(data), Tune())


def latency(picks) -> Outcome:
    """The lowest at a = 6 and b = {"c": "z"}."""
    away = abs(picks["$.a"] - 5) + (1 - picks.get("$.b.choose[1].c", -1))
    return Outcome("kept", {"latency": 1.0 + away})


def run(trials: Trials, most: int | None = None) -> None:
    while trials.left and most != 0:
        asked = trials.begin()
        trials.end(asked, latency(asked.picks))
        most = None if most is None else most - 1


def test_all_are_tried_once_where_there_are_not_more_than_asked_for(tmp_path):
    data = DATA | {"a": {"choose": {"from": 1, "to": 2}}}
    with opened(tmp_path, tuning(data), GOAL, 20) as trials:
        assert trials.left == count(data) == 6
        run(trials)
        assert trials.left == 0
        assert len({str(trial.picks) for trial in trials}) == 6


def test_the_sampler_tries_other_combinations_each_time_and_comes_near_the_best(tmp_path):
    with opened(tmp_path, tuning(DATA), GOAL, 14) as trials:
        run(trials)
        found = list(trials)
    assert [trial.number for trial in found] == list(range(1, 15))
    assert len({str(sorted(trial.picks.items())) for trial in found}) == 14
    assert min(trial.outcome.measures["latency"] for trial in found) <= 2.0


def test_a_study_goes_on_and_a_combination_whose_process_died_is_tried_again(tmp_path):
    data = DATA | {"a": {"choose": {"from": 1, "to": 2}}}
    with opened(tmp_path, tuning(data), GOAL, 20) as trials:
        run(trials, 2)
        before = list(trials)
        died = trials._ask().picks  # nobody ends it
    with opened(tmp_path, tuning(data), GOAL, 20) as trials:
        assert list(trials) == before
        asked = trials.begin()
        assert asked.picks == died
        trials.end(asked, Outcome("refused", reason="no room"))
        run(trials)
        found = list(trials)
    assert [trial.outcome.end for trial in found] == ["kept", "kept", "refused", "kept", "kept", "kept"]
    assert found[2].outcome.reason == "no room"


def test_a_trial_that_was_measured_counts_though_its_process_died_before_the_sampler_knew(tmp_path):
    with opened(tmp_path, tuning(DATA), GOAL, 3) as trials:
        asked = trials._ask()
        asked.trial.set_user_attr("outcome", Outcome("kept", {"latency": 2.0}).as_json())
    with opened(tmp_path, tuning(DATA), GOAL, 3) as trials:
        assert [trial.outcome.measures for trial in trials] == [{"latency": 2.0}]
        assert trials.left == 2
        assert trials._study.best_value == 2.0


def test_a_trial_that_is_dropped_is_not_counted(tmp_path):
    with opened(tmp_path, tuning(DATA), GOAL, 3) as trials:
        asked = trials.begin()
        assert (trials.begun, trials.left) == (1, 2)
        trials.drop(asked)
        assert (trials.begun, trials.left) == (0, 3)


@pytest.mark.parametrize("most", [3, 6])
def test_trials_that_run_at_once_are_of_different_combinations(tmp_path, most):
    data = DATA | {"a": {"choose": {"from": 1, "to": 2}}}
    with opened(tmp_path, tuning(data), GOAL, most) as trials:
        running = [trials.begin() for _ in range(trials.left)]
        assert trials.left == 0
        assert len({str(sorted(asked.picks.items())) for asked in running}) == most
        for asked in reversed(running):
            trials.end(asked, latency(asked.picks))
        assert len(list(trials)) == most


def test_what_another_beats_is_beaten_and_noise_beats_nothing(tmp_path):
    numbers = [(1.0, 5.0), (2.0, 4.0), (2.1, 4.5), (1.0, 5.01), (3.0, 1.0)]
    with opened(tmp_path, tuning(DATA), GOAL, len(numbers) + 1) as trials:
        for latency_, memory in numbers:
            trials.end(trials.begin(), Outcome("kept", {"latency": latency_, "memory": memory}))
        trials.end(trials.begin(), Outcome("missed", {"latency": 0.1, "memory": 0.1}, "latency"))
        found = list(trials)
    assert unbeaten(found, GOAL) == (1, 2, 4, 5)
