"""A short run of every harness with each run of the tests; `make fuzz` goes on for longer, and is led by coverage."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.__main__ import MAX_BYTES
from tests.fuzz.harnesses import CORPUS, HARNESSES, corpus
from tests.fuzz.mutate import some_bytes

# Each damaged directory is a copy of a bundle, and some are loaded and called; the others are of bytes in memory.
_EXAMPLES = dict.fromkeys(HARNESSES, 100) | {"engines": 15, "bundles": 10}
SEEDS = st.integers(0, 2**32)


def test_every_harness_has_a_corpus_of_small_files():
    assert {entry.name for entry in CORPUS.iterdir()} == set(HARNESSES)
    assert all(path.stat().st_size <= MAX_BYTES for name in HARNESSES for path in corpus(name))


@pytest.mark.parametrize("name", HARNESSES)
def test_kept_inputs_are_read_or_refused(name):
    for path in corpus(name):
        HARNESSES[name].run(path.read_bytes())


@pytest.mark.parametrize("name", HARNESSES)
def test_changed_inputs_are_read_or_refused(name):
    harness = HARNESSES[name]

    @settings(max_examples=_EXAMPLES[name], deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.sampled_from(corpus(name)), SEEDS, st.booleans())
    def read_or_refuse(path, seed, formless):
        change = some_bytes if formless else harness.mutate
        harness.run(change(path.read_bytes(), seed))

    read_or_refuse()


def test_a_harness_lets_nothing_but_refusals_pass(monkeypatch):
    """Otherwise ten minutes without a finding would say nothing."""

    def broken(_data):
        raise KeyError("dtype")

    monkeypatch.setattr("tests.fuzz.harnesses.parse_spec", broken)
    with pytest.raises(KeyError):
        HARNESSES["spec"].run(b"{}")
