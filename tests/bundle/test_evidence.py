"""What each pass cost, read from a file that strangers may have written."""

from __future__ import annotations

import pytest

from diffkiln.bundle.card import card
from diffkiln.bundle.evidence import costs_of
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
