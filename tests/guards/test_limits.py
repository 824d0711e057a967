from __future__ import annotations

import pytest

from diffkiln.errors import LimitExceeded
from diffkiln.guards.limits import Limits, active, applied


def test_says_what_was_found_what_is_allowed_and_how_to_allow_more() -> None:
    with pytest.raises(
        LimitExceeded, match=r"program: operations is 300,000, and 9 is allowed.*Limits\(operations=300000"
    ):
        Limits(operations=9).check("operations", 300_000, "program")


def test_allows_what_is_at_the_limit_and_all_where_there_is_none() -> None:
    Limits(operations=9).check("operations", 9, "program")
    Limits(memory_bytes=None).check("memory_bytes", 1 << 60, "program")


def test_limits_hold_within_their_block_and_no_longer() -> None:
    before = active()
    with applied(Limits(tokens=3)) as limits, applied(None):
        assert active() is limits
    assert active() is before
