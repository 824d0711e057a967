"""What each pass cost, read from a file that strangers may have written."""

from __future__ import annotations

import pytest

from diffkiln.bundle.card import card
from diffkiln.bundle.evidence import costs_of, sizes_of, working_memory_of
from tests.bundle.making import manifest_of

ROWS = [{"pass": "quantize", "value": 35.5}, {"pass": "bundle", "value": None}]


def ledger(**table) -> dict:
    return {"ledger": {"tables": [{"metric": "psnr", "at_least": 28, "cumulative": ROWS} | table]}}


def test_a_table_is_read_and_shown_on_the_card():
    (found,) = costs_of(ledger(each=[{"pass": "quantize", "value": 36}]))
    assert (found.metric, found.gate, found.floor) == ("psnr", "at least 28", 28)
    assert found.cumulative == (("quantize", 35.5), ("bundle", None))
    text = card(manifest_of(), ledger(each=[{"pass": "quantize", "value": 36}]))
    assert "| psnr at least 28 | after this pass | with it alone |" in text
    assert "| quantize | 35.5 | 36 |" in text
    assert "| bundle | not measured | not measured |" in text


@pytest.mark.parametrize(
    "build",
    [
        {},
        {"ledger": 3},
        {"ledger": {"tables": 3}},
        {"ledger": {"tables": [3]}},
        ledger(metric=3),
        ledger(at_least=True),
        ledger(at_least=float("nan")),
        ledger(cumulative=3),
        ledger(cumulative=[3, {"pass": 3}]),
    ],
)
def test_what_is_not_as_expected_is_left_out(build):
    assert costs_of(build) == []


def test_a_name_stays_text_on_the_card():
    text = card(manifest_of(), ledger(metric="<b>|x", cumulative=[{"pass": "<script>", "value": 1}]))
    assert "<script>" not in text
    assert "<b>" not in text


SIZES = {
    "weights": {"transformer": 400, "vae": 80},
    "passes": [
        {"name": "fuse_qkv", "component": "transformer", "bytes": 400},
        {"name": "quantize", "component": "transformer", "bytes": 100},
        {"name": "compile", "component": "vae", "bytes": 80},
    ],
}


def test_sizes_are_those_of_the_source_and_after_each_pass_that_changed_them():
    assert sizes_of(SIZES) == {
        "source": {"transformer": 400, "vae": 80},
        "2: quantize": {"transformer": 100, "vae": 80},
    }


@pytest.mark.parametrize(
    "build",
    [
        {},
        {"weights": 3},
        {"weights": {"vae": "much"}},
        {"weights": {}, "passes": [{"name": "quantize", "component": "vae", "bytes": 1}]},
    ],
)
def test_what_tells_no_sizes_gives_none(build):
    assert sizes_of(build) == {}


@pytest.mark.parametrize("row", [3, None, {}, {"component": ["vae"], "bytes": 1}, {"component": "vae", "bytes": True}])
def test_a_strange_pass_is_left_out(row):
    assert sizes_of({"weights": {"vae": 80}, "passes": [row]}) == {"source": {"vae": 80}}


@pytest.mark.parametrize(
    "row",
    [3, None, {"bytes": 3}, {"bytes": 3, "threads": True}, {"bytes": -3, "threads": 2}, {"bytes": 2**41, "threads": 2}],
)
def test_working_memory_that_nobody_can_have_measured_is_left_out(row):
    good = {"bytes": 3, "threads": 2}
    assert working_memory_of({"working_memory": {"mine": good | {"more": 1}, "other": row}}) == {"mine": good}


@pytest.mark.parametrize("build", [{}, {"working_memory": 3}, {"working_memory": []}])
def test_without_working_memory_there_is_none(build):
    assert working_memory_of(build) == {}
