"""Choices in a spec: what they stand for, and what is wrong with some."""

from __future__ import annotations

from itertools import islice

import pytest

from diffkiln.errors import SpecError
from diffkiln.spec.choices import active, choices_of, chooses, combinations, count, in_words, leading_to, resolved

NESTED = {
    "a": {"choose": [1, 2]},
    "passes": [
        {"choose": [None, {"name": "p", "interval": {"choose": {"from": 2, "to": 4}}}, ["q", "r"]]},
        "last",
    ],
}


def every(data) -> list:
    return [resolved(data, picks) for picks in combinations(data)]


def test_each_combination_appears_once_and_an_inner_choice_counts_where_its_value_is_chosen():
    found = every(NESTED)
    assert len(found) == count(NESTED) == 2 * (1 + 3 + 1)
    assert len({str(item) for item in found}) == 10


def test_in_a_list_null_leaves_out_and_a_list_stands_for_several():
    passes = [item["passes"] for item in every(NESTED)[:5]]
    assert passes[0] == ["last"]
    assert [item[0]["interval"] for item in passes[1:4]] == [2, 3, 4]
    assert passes[4] == ["q", "r", "last"]


def test_in_an_object_null_stays():
    assert every({"a": {"choose": [None, 1]}}) == [{"a": None}, {"a": 1}]


@pytest.mark.parametrize(
    ("given", "numbers"),
    [
        ({"from": 1, "to": 3}, [1, 2, 3]),
        ({"from": 1, "to": 8, "step": 3}, [1, 4, 7]),
        ({"from": 0.1, "to": 0.4, "step": 0.1}, [0.1, 0.2, 0.3, 0.4]),
        ({"from": 0, "to": 1, "step": 0.5}, [0.0, 0.5, 1.0]),
        ({"from": -2, "to": 0}, [-2, -1, 0]),
    ],
)
def test_a_range_has_its_last_number_and_no_rounding(given, numbers):
    (choice,) = choices_of({"a": {"choose": given}})
    assert list(choice.values) == numbers
    assert choice.ordered


def test_what_is_not_chosen_has_no_part_in_the_picks():
    picks = {"$.a": 1, "$.passes[0]": 0, "$.passes[0].choose[1].interval": 2}
    assert active(NESTED, picks) == {"$.a": 1, "$.passes[0]": 0}


def test_an_inner_value_is_reached_through_those_around_it_without_trying_the_rest():
    choices = choices_of(NESTED)
    fixed = leading_to(choices, "$.passes[0].choose[1].interval", 2)
    assert fixed == {"$.passes[0].choose[1].interval": 2, "$.passes[0]": 1}
    assert [resolved(NESTED, picks)["passes"][0]["interval"] for picks in combinations(NESTED, fixed)] == [4, 4]
    many = {str(number): {"choose": [0, 1]} for number in range(60)}
    first = next(islice(combinations(many, {'$["0"]': 1}), 1))
    assert first['$["0"]'] == 1


def test_picks_are_told_in_words():
    picks = {"$.a": 0, "$.passes[0]": 1, "$.passes[0].choose[1].interval": 0}
    assert in_words(choices_of(NESTED), picks) == 'a: 1, passes[0]: {"name": "p"}, passes[0].choose[1].interval: 2'


def test_a_plain_value_holds_no_choice():
    assert not chooses({"a": [{"b": "choose"}]})
    assert count({"a": 1}) == 1
    assert every([1, [2]]) == [[1, [2]]]


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ({"choose": []}, "$.a: is a choice of nothing"),
        ({"choose": [1]}, "$.a: is a choice of one value, so there is nothing to choose"),
        ({"choose": [1, 2, 1]}, "$.a.choose[2]: 1 is there already"),
        ({"choose": 3}, "$.a.choose: must be a list or a range, not 3"),
        ({"choose": [1, 2], "of": 1}, "$.a.of: stands beside a choice"),
        ({"choose": {"from": 1}}, "$.a.choose.to: this field is missing"),
        ({"choose": {"from": 1, "until": 2}}, "$.a.choose.until: there is no such field"),
        ({"choose": {"from": 1, "to": True}}, "$.a.choose.to: must be a number, not true"),
        ({"choose": {"from": 1, "to": 1}}, "$.a.choose: is a choice of one value"),
        ({"choose": {"from": 1, "to": 5, "step": 0}}, "$.a.choose.step: must be greater than 0"),
        ({"choose": {"from": 0.5, "to": 5}}, "$.a.choose.step: this field is missing"),
        ({"choose": {"from": 1, "to": 10**6}}, "$.a.choose: is a choice of more than 1000 values"),
    ],
)
def test_a_malformed_choice_is_refused_in_a_sentence(choice, words):
    with pytest.raises(SpecError) as caught:
        choices_of({"a": choice})
    assert str(caught.value).startswith(words)


def test_true_and_one_are_two_values():
    assert len(choices_of({"a": {"choose": [True, 1]}})[0].values) == 2


def test_all_that_is_malformed_is_told_together():
    with pytest.raises(SpecError) as caught:
        choices_of({"a": {"choose": []}, "b": {"choose": [1, {"choose": [2]}]}})
    assert [problem.where for problem in caught.value.problems] == ["$.a", "$.b.choose[1]"]
