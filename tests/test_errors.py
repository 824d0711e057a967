"""Errors that gather what several looks found."""

from __future__ import annotations

import pytest

import diffkiln
from diffkiln.errors import Problem, SourceError, SpecError, gather_problems


def raising(error: Exception):
    def look():
        raise error

    return look


def test_without_errors_all_results_are_given() -> None:
    assert gather_problems(lambda: 1, lambda: 2) == [1, 2]


def test_one_error_stays_what_it_is() -> None:
    error = SourceError("damaged")
    with pytest.raises(SourceError) as caught:
        gather_problems(lambda: 1, raising(error))
    assert caught.value is error


def test_several_are_one_with_the_problems_of_all() -> None:
    known = SpecError(problems=[Problem("$.a", "is wrong", "Mend it.")])
    with pytest.raises(SpecError) as caught:
        gather_problems(raising(known), lambda: 1, raising(SourceError("the file is damaged")))
    assert [str(problem) for problem in caught.value.problems] == ["$.a: is wrong. Mend it.", "the file is damaged"]


def test_what_is_no_error_of_the_spec_is_not_held_back() -> None:
    with pytest.raises(ZeroDivisionError):
        gather_problems(raising(ZeroDivisionError()), raising(SpecError("never looked at")))


def test_a_misspelt_pass_and_a_missing_model_are_told_at_once(tmp_path) -> None:
    spec = {
        "spec_version": 1,
        "source": {"model": "missing"},
        "target": {"device": "cpu"},
        "inputs": {"height": 32, "width": 32, "num_inference_steps": 8},
        "passes": [{"name": "quantise"}],
    }
    with pytest.raises(SpecError) as caught:
        diffkiln.check(spec, base=tmp_path)
    assert [problem.where for problem in caught.value.problems] == ["$.passes[0].name", "$.source.model"]
