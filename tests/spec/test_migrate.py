import copy
import sys

import pytest

from diffkiln.errors import SpecError
from diffkiln.spec import migrate, parse_spec


def test_the_current_version_is_left_as_it_is():
    data = {"spec_version": 1, "anything": 2}
    assert migrate(data) == data


def test_a_missing_version_is_left_to_the_model():
    assert migrate({}) == {}
    with pytest.raises(SpecError, match=r"\$\.spec_version: this field is missing"):
        parse_spec({})


def test_a_newer_version_says_to_upgrade():
    with pytest.raises(SpecError, match="newer than this diffkiln") as caught:
        parse_spec({"spec_version": 2, "new_field": 1})
    [problem] = caught.value.problems
    assert problem.where == "$.spec_version"
    assert "Upgrade" in problem.hint


@pytest.mark.parametrize("version", [0, -1, True, 1.0, "1", None, [], pytest.param(10**5000, id="huge")])
def test_no_other_version_is_taken(version):
    with pytest.raises(SpecError, match="spec_version"):
        migrate({"spec_version": version})


def test_an_earlier_version_is_brought_to_the_current_one_step_by_step(monkeypatch):
    """With steps of two versions that there might be: a field renamed, then one made a list."""
    module = sys.modules["diffkiln.spec.migrate"]
    steps = {
        1: lambda data: {("stages" if key == "passes" else key): value for key, value in data.items()},
        2: lambda data: data | {"target": [data["target"]]},
    }
    monkeypatch.setattr(module, "CURRENT", 3)
    monkeypatch.setattr(module, "STEPS", steps)
    first = {"spec_version": 1, "passes": [{"name": "compile"}], "target": {"device": "cpu"}}
    before = copy.deepcopy(first)
    third = {"spec_version": 3, "stages": [{"name": "compile"}], "target": [{"device": "cpu"}]}
    assert migrate(first) == third == migrate({**third, "spec_version": 2, "target": {"device": "cpu"}})
    assert first == before
    assert migrate(third) == third
    with pytest.raises(SpecError, match="no version 0"):
        migrate({"spec_version": 0})
