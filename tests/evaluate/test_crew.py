"""Trials that are made side by side, by a crew whose trials end when the test says so, and on nodes of Ray."""

from __future__ import annotations

import importlib.util
import json
import time

import pytest

from diffkiln.errors import MissingDependency, SystemRefused
from diffkiln.evaluate.study import opened
from diffkiln.evaluate.trials import Goal, Outcome
from diffkiln.evaluate.tune import _try, tune
from diffkiln.spec.choices import choices_of
from diffkiln.spec.tuning import Limits, Tune, Tuning
from tests.evaluate.test_tune import FORA, write

GOAL = Goal(Limits(), {}, "latency")
DATA = {"a": {"choose": {"from": 1, "to": 5}}}
TUNING = Tuning(DATA, choices_of(DATA), Tune())


class Nodes:
    """Two nodes, of which the first work to begin is the last to end; those in `lost` die with their trial."""

    def __init__(self, lost=(), fails=()):
        self.machine = {}
        self.capacity, self.most, self._lost, self._fails, self._specs = 2, 0, list(lost), list(fails), {}

    def begin(self, spec, goal):
        work = object()
        self._specs[work] = spec
        return work

    def first(self, works):
        self.most = max(self.most, len(works))
        work = works[-1]
        value = self._specs.pop(work)["a"]
        if value in self._fails:
            raise SystemRefused("no room on the disk")
        if value in self._lost:
            self._lost.remove(value)
            self.capacity -= 1
            return work, None
        return work, Outcome("kept", {"latency": float(value)})


def tried(folder, nodes):
    said: list[str] = []
    with opened(folder, TUNING, GOAL, 5) as study:
        _try(study, TUNING, GOAL, nodes, float("inf"), said.append)
        return [trial.outcome.measures["latency"] for trial in study], said


def test_as_many_run_at_once_as_there_are_places_and_all_are_made_once(tmp_path):
    nodes = Nodes()
    found, said = tried(tmp_path, nodes)
    assert nodes.most == 2
    assert sorted(found) == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert [line.partition(":")[0] for line in said] == [f"trial {number}" for number in range(1, 6)]


def test_a_trial_whose_node_is_lost_is_made_again_by_another(tmp_path):
    nodes = Nodes(lost=[3])
    found, _ = tried(tmp_path, nodes)
    assert sorted(found) == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert nodes.capacity == 1


def test_what_would_end_every_trial_ends_the_tuning_and_the_others_are_made_later(tmp_path):
    with pytest.raises(SystemRefused, match="no room"):
        tried(tmp_path, Nodes(fails=[3]))
    found, _ = tried(tmp_path, Nodes())
    assert sorted(found) == [1.0, 2.0, 3.0, 4.0, 5.0]


def test_without_ray_the_error_names_the_extra(tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "ray" else found(name, *more))
    with pytest.raises(MissingDependency, match=r"pip install 'diffkiln\[ray\]'"):
        tune(write(tmp_path, passes=[{"choose": [None, FORA]}]), tmp_path / "out", ray="auto")


@pytest.fixture(scope="module")
def address():
    """Two nodes of one core on this machine."""
    import ray
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    nodes.add_node(num_cpus=1)
    nodes.wait_for_nodes()
    yield nodes.address
    ray.shutdown()
    nodes.shutdown()


@pytest.mark.more
def test_two_nodes_make_the_trials_that_one_makes(address, tmp_path):
    file = write(tmp_path, passes=[{"choose": [None, FORA]}], inputs={"choose": [digits(2), digits(3)]})
    begun = time.monotonic()
    alone = tune(file, tmp_path / "alone")
    between = time.monotonic()
    (tmp_path / "spec-tuned.json").unlink()
    together = tune(file, tmp_path / "together", ray=address)
    print(f"alone {between - begun:.1f} s, on two nodes {time.monotonic() - between:.1f} s")
    assert [trial.picks for trial in together.trials] == [trial.picks for trial in alone.trials]
    assert [trial.outcome.end for trial in together.trials] == [trial.outcome.end for trial in alone.trials]
    assert [trial.outcome.measures["bytes"] for trial in together.trials] == [
        trial.outcome.measures["bytes"] for trial in alone.trials
    ]


@pytest.mark.more
def test_nobody_at_the_address_is_an_error_before_anything_is_tried(tmp_path):
    with pytest.raises(SystemRefused, match=r"no Ray cluster at 127.0.0.1:1: .*ray start --head"):
        tune(write(tmp_path, passes=[{"choose": [None, FORA]}]), tmp_path / "out", ray="127.0.0.1:1")


def digits(steps: int) -> dict:
    from tests.conftest import DIGITS

    return json.loads((DIGITS / "spec.json").read_text())["inputs"] | {"num_inference_steps": steps}
