"""Engines for absent GPUs, run on the CPU as twins: they compute what the replays of their regions do."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.pipelines import WARNING_FILTERS
from tests.twins.cases import CASES, MISLAID, MISTAKEN, SAMPLE
from tests.twins.mistaken import MISTAKES
from tests.twins.processes import Building, building, ran

pytestmark = [pytest.mark.filterwarnings(text) for text in WARNING_FILTERS]

REST = [name for name in CASES if name not in SAMPLE]

#: The compute capability of an engine's kernels, by the target.
_SM = {"nvidia-l4": "sm_89", "nvidia-h200": "sm_90a"}


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Building]:
    with building(tmp_path_factory.mktemp("twins"), list(SAMPLE)) as process:
        yield process


@pytest.fixture(scope="module")
def rest(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Building]:
    with building(tmp_path_factory.mktemp("twins"), REST) as process:
        yield process


def computes_what_its_replay_does(folder: Path) -> None:
    (result,) = ran("running", folder)
    assert "fault" not in result, result["fault"]
    assert result["errors"]
    assert result["launches"] >= result["kernels"] > 0
    assert set(result["cubins"]) <= set(_SM.values())


@pytest.mark.twin
@pytest.mark.parametrize("name", [name for name in SAMPLE if name != MISLAID])
def test_a_twin_computes_what_its_replay_does(name: str, sample: Building) -> None:
    folder, _ = sample.twin(name)
    computes_what_its_replay_does(folder)


@pytest.mark.twin_all
@pytest.mark.parametrize("name", REST)
def test_another_twin_computes_what_its_replay_does(name: str, rest: Building) -> None:
    folder, _ = rest.twin(name)
    computes_what_its_replay_does(folder)


@pytest.mark.twin
def test_a_result_of_torch_that_lies_otherwise_than_the_engine_assumes_is_named(sample: Building) -> None:
    folder, _ = sample.twin(MISLAID)
    (result,) = ran("running", folder)
    assert "stride 1==64 at dim=1" in result["fault"]
    assert "aten.convolution.default" in result["fault"]


@pytest.mark.twin
def test_each_mistake_is_found(sample: Building) -> None:
    folder, _ = sample.twin(MISTAKEN)
    messages = {line["mistake"]: line["found"] for line in ran("mistakes", folder)}
    assert messages.keys() == MISTAKES.keys()
    missed = [name for name, message in messages.items() if MISTAKES[name].found not in message]
    assert not missed, {name: messages[name] for name in missed}


def test_the_sample_is_representative() -> None:
    assert len(SAMPLE) >= 8
    assert SAMPLE.keys() < CASES.keys()
