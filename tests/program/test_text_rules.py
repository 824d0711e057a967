"""What a prompt quotes is taken apart as diffusers does for LongCat-Image."""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from diffkiln.program.text_rules import RULES

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
