"""What a prompt quotes is taken apart as diffusers does for LongCat-Image, and what must be an edit is one."""

from __future__ import annotations

import json

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from diffkiln.program.text_rules import FORMS, RULES, form_of

QUOTATIONS = RULES["quotations"]["characters"]
pieces = QUOTATIONS.pieces


def of_diffusers(prompt):
    from diffusers.pipelines.longcat_image.pipeline_longcat_image import split_quotation

    return [piece for part, quoted in split_quotation(prompt) for piece in (part if quoted else [part])]


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "a red fox",
        "a sign that says 'Fox' and \"red\"",
        "\u201cA\u201d or \u2018b\u2019, \u201cnot closed",
        "it doesn't say 'it doesn't'",
        "'twas doesn't",
        "rock'n'roll",
        "''\"\"",
    ],
)
def test_pieces_are_those_of_diffusers(prompt):
    assert pieces(prompt) == of_diffusers(prompt)


@given(st.text(alphabet="ab '\"\u2018\u2019\u201c\u201d\n\u4e2d", max_size=24))
def test_pieces_of_any_prompt_are_those_of_diffusers(prompt):
    assume(len(set(QUOTATIONS.word.findall(prompt))) < 2)
    assert pieces(prompt) == of_diffusers(prompt)


def test_several_words_with_an_apostrophe_stay_what_they_are():
    assert pieces("it isn't what it wasn't, \"no\"") == ["it isn't what it wasn't, ", '"', "n", "o", '"']


@given(st.text(alphabet="ab '\"\u2018\u2019\u201c\u201d", max_size=40))
def test_pieces_joined_are_the_prompt(prompt):
    assert "".join(pieces(prompt)) == prompt


@given(st.text(max_size=24) | st.sampled_from(["edit_instruction", '{"edit_instruction": 1}', "[" * 50]))
def test_an_edit_is_what_diffusers_takes_for_one(text):
    from diffusers.pipelines.bria_fibo.pipeline_bria_fibo_edit import is_valid_edit_json

    form = FORMS["form"]["edit_json"]
    assert form.is_met(form.made_of(text))
    assert json.loads(form.made_of(text)) == {"edit_instruction": text}
    for prompt in (text, form.made_of(text)):
        assert form.is_met(prompt) == is_valid_edit_json(prompt)


def test_an_edit_that_is_too_deep_is_none():
    assert not FORMS["form"]["edit_json"].is_met("[" * 100_000 + '"edit_instruction"')


def test_a_form_is_of_the_prompt_alone():
    text = {"form": "edit_json"}
    assert form_of(text, "prompt") is FORMS["form"]["edit_json"]
    assert form_of(text, "negative_prompt") is None
    assert form_of({}, "prompt") is None
