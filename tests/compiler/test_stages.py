"""Stages are told as they begin, and timed."""

import pytest

from diffkiln.compiler.stages import Stages


def test_steps_are_told_in_order_and_timed():
    told = []
    steps = Stages(told.append)
    for name in ("check", "record", "check"):
        with steps(name):
            pass
    assert told == ["check", "record", "check"]
    assert list(steps.seconds) == ["check", "record"]


def test_a_step_that_fails_is_timed_too():
    steps = Stages()
    with pytest.raises(ZeroDivisionError), steps("divide"):
        1 / 0  # noqa: B018
    assert steps.seconds["divide"] >= 0
