from enum import Enum
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, Field, ValidationError, field_validator

from diffkiln.errors import Problem
from diffkiln.spec import Strict, problems_from, suggest
from diffkiln.spec.problems import MAX_PROBLEMS, path_to, show


class Int8(Strict):
    kind: Literal["int8"]
    group: int = 32


class Fp8(Strict):
    kind: Literal["fp8"]
    rows: bool = False


class Options(Strict):
    """Options of a pass."""

    component: str = Field(description="The component to work on.")
    exclude: tuple[str, ...] = ()
    groups: dict[str, Annotated[int, Field(ge=1)]] = Field(default_factory=dict)
    interval: int | str = 2
    config: Annotated[Int8 | Fp8, Field(discriminator="kind")] | None = None

    @field_validator("component")
    @classmethod
    def _lower(cls, value: str) -> str:
        if value != value.lower():
            raise ValueError("must be in lower case")
        return value


def found(fields: Any, model: type[BaseModel] = Options, prefix: str = "$.passes[1]") -> list[Problem]:
    with pytest.raises(ValidationError) as caught:
        model.model_validate(fields)
    return problems_from(caught.value, model, prefix)


def only(fields: Any) -> Problem:
    [problem] = found(fields)
    return problem


def test_missing_field_is_described():
    assert only({}) == Problem("$.passes[1].component", "this field is missing", "Add it: The component to work on.")


def test_unknown_field_gets_a_suggestion():
    problem = only({"component": "a", "exlude": ()})
    assert problem == Problem("$.passes[1].exlude", "there is no such field", 'Did you mean "exclude"?')


def test_unknown_field_like_no_other_gets_the_list():
    assert "component, exclude, groups" in only({"component": "a", "zzz": ()}).hint


def test_item_of_a_list_and_of_a_mapping_have_their_path():
    assert only({"component": "a", "exclude": ("x", 3)}).where == "$.passes[1].exclude[1]"
    assert only({"component": "a", "groups": {"to q": 0}}) == Problem(
        '$.passes[1].groups["to q"]', "must be at least 1, not 0"
    )


def test_union_is_one_problem_at_the_fields_own_path():
    assert only({"component": "a", "interval": []}) == Problem(
        "$.passes[1].interval", "must be a whole number, not []; or must be text, not []"
    )


def test_discriminated_union_has_no_tag_in_its_path():
    problem = only({"component": "a", "config": {"kind": "int8", "rows": True}})
    assert (problem.where, problem.reason) == ("$.passes[1].config.rows", "there is no such field")
    assert problem.hint == "The fields are: kind, group"


def test_unknown_discriminator_gets_a_suggestion():
    problem = only({"component": "a", "config": {"kind": "int88"}})
    assert problem.where == "$.passes[1].config.kind"
    assert problem.hint == 'Did you mean "int8"?'


def test_error_of_a_validator_is_its_own_sentence():
    assert only({"component": "VAE"}).reason == "must be in lower case"


def test_enum_and_literal_list_their_choices():
    class Colour(Enum):
        RED = "red"
        BLUE = "blue"

    class Paint(Strict):
        colour: Literal["red", "blue"]
        other: Colour = Field(default=Colour.RED, strict=False)

    problems = found({"colour": "bleu", "other": "rd"}, Paint, "$")
    assert [str(problem) for problem in problems] == [
        '$.colour: "bleu" is not one of "red", "blue". Did you mean "blue"?',
        '$.other: "rd" is not one of "red", "blue". Did you mean "red"?',
    ]


def test_what_has_no_sentence_here_keeps_pydantics():
    class When(BaseModel):
        size: Annotated[str, Field(strict=True)] | bytes = b""
        ratio: complex = 0

    [problem] = found({"ratio": "x"}, When, "$")
    assert problem.where == "$.ratio"
    assert problem.reason[0].islower()


def test_thousands_of_problems_are_cut_short():
    problems = found({"component": "a", **{f"z{index}": 1 for index in range(1000)}})
    assert len(problems) == MAX_PROBLEMS + 1
    assert "950 more" in problems[-1].reason


@pytest.mark.parametrize(
    ("word", "choices", "expected"),
    [
        ("Quantise", ["fuse_qkv", "quantize"], 'Did you mean "quantize"?'),
        ("NF5", ["nf4", "int8"], 'Did you mean "nf4"?'),
        ("zebra", ["fuse_qkv", "quantize"], ""),
        ("", ["a"], ""),
        ("x" * 1_000_000, ["x"], ""),
        ("x", [], ""),
    ],
)
def test_suggest(word, choices, expected):
    assert suggest(word, choices) == expected


def test_path_quotes_what_is_not_a_name():
    assert path_to("$", "passes", 1, "type", "$schema", 'a"b') == '$.passes[1].type["$schema"]["a\\"b"]'


@pytest.mark.parametrize(
    "value",
    ["x" * 10_000, pytest.param(10**5000, id="huge"), object(), pytest.param("\ud800", id="surrogate"), [[1]] * 5000],
)
def test_shown_values_are_short_and_printable(value):
    text = show(value)
    assert len(text) < 80
    text.encode()
