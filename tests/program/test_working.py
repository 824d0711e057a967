"""How much working memory a plan counts: what a build measured, an estimate, or none."""

from __future__ import annotations

import pytest

from diffkiln.program.working import ESTIMATE, PER_THREAD, PLANNED_FROM, WorkingMemory, working_memory


def test_what_was_measured_counts() -> None:
    found = working_memory(PLANNED_FROM, {"cpu": {"bytes": 70, "threads": 2}}, threads=2)
    assert found == WorkingMemory(70, measured=True)
    assert str(found) == "70 bytes of working memory, measured"
    assert found.as_json() == {"bytes": 70, "measured": True}


@pytest.mark.parametrize(("threads", "more"), [(1, 0), (2, 0), (3, PER_THREAD), (8, 6 * PER_THREAD)])
def test_each_thread_more_than_were_measured_adds_to_it(threads: int, more: int) -> None:
    found = working_memory(PLANNED_FROM, {"cpu": {"bytes": 70, "threads": 2}}, threads)
    assert found is not None
    assert found.nbytes == 70 + more


def test_of_several_targets_the_most_counts() -> None:
    rows = {"one": {"bytes": 70, "threads": 2}, "other": {"bytes": 90, "threads": 2}}
    assert working_memory(0, rows, threads=2) == WorkingMemory(90, measured=True)


def test_where_nothing_was_measured_a_large_bundle_has_an_estimate_and_a_small_one_nothing() -> None:
    assert working_memory(PLANNED_FROM, {}, threads=2) == WorkingMemory(ESTIMATE, measured=False)
    assert working_memory(PLANNED_FROM - 1, {}, threads=2) is None
