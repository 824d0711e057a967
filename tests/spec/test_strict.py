import pytest
from pydantic import ValidationError

from diffkiln.spec import Json, Strict, freeze, problems_from, refuse


class Both(Strict):
    left: int | None = None
    right: int | None = None
    free: Json = None

    @classmethod
    def conflicts(cls, given):
        if {"left", "right"} <= set(given):
            yield ("right",), refuse("not with left", "Remove it")


def test_null_is_not_given():
    assert Both(left=1, right=None).right is None


def test_conflict_holds_for_python_and_for_dicts():
    for build in (lambda: Both(left=1, right=2), lambda: Both.model_validate({"left": 1, "right": 2})):
        with pytest.raises(ValidationError, match="not with left"):
            build()


def test_conflict_comes_with_the_problems_of_fields():
    with pytest.raises(ValidationError) as caught:
        Both.model_validate({"left": "1", "right": 2, "middle": 3, "free": object()})
    found = [(problem.where, problem.hint) for problem in problems_from(caught.value, Both)]
    assert [where for where, _ in found] == ["$.left", "$.free", "$.middle", "$.right"]
    assert found[-1] == ("$.right", "Remove it")


def test_freeze_makes_tuples_and_copies_objects():
    value = {"a": [1, [2.5, None]], "b": {"c": [True, "x"]}}
    frozen = freeze(value)
    assert frozen == {"a": (1, (2.5, None)), "b": {"c": (True, "x")}}
    assert frozen["b"] is not value["b"]
