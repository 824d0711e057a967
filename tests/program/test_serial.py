"""Programs as JSON: there and back, the same bytes each time, and nothing but our errors from hostile text."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffkiln.errors import DiffkilnError
from diffkiln.program import (
    DType,
    Layout,
    MemoryFormat,
    Op,
    Ref,
    dumps,
    fingerprint,
    listing,
    module_from_json,
    module_listing,
    module_to_json,
    program_from_json,
    program_to_json,
    verify,
)
from diffkiln.program.listing import text_line
from tests.program.programs import BLOCK, BODY, F4, MODULE, PIPELINE


@pytest.mark.parametrize("program", [BLOCK, BODY, PIPELINE], ids=lambda program: program.name)
def test_round_trip_keeps_everything(program):
    assert program_from_json(json.loads(dumps(program_to_json(program)))) == program


def test_module_round_trip():
    assert module_from_json(json.loads(dumps(module_to_json(MODULE)))) == MODULE


def test_literals_of_every_kind_survive():
    args = (True, 1, 1.0, 1.5, -0.0, float("inf"), None, "text", DType("bfloat16"), MemoryFormat("channels_last"))
    args = (*args, Layout("strided"), (1, (Ref("%x"), ())))
    program = replace(BLOCK, ops=(Op("aten.neg.default", args, ("%2",)),))
    again = program_from_json(json.loads(dumps(program_to_json(program))))
    assert [(type(a), repr(a)) for a in again.ops[0].args] == [(type(a), repr(a)) for a in args]


def test_dumps_are_deterministic_and_put_an_operation_on_a_line():
    data = dumps(program_to_json(PIPELINE))
    assert data == dumps(program_to_json(PIPELINE))
    assert sum(b'"op"' in line for line in data.splitlines()) == len(PIPELINE.ops)


def test_fingerprints_are_of_what_is_computed_and_not_of_the_name():
    assert fingerprint(BLOCK) == fingerprint(replace(BLOCK, name="Other"))
    assert fingerprint(BLOCK) != fingerprint(replace(BLOCK, ops=BLOCK.ops[:1], outputs=(Ref("%1"),)))


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damaged_json_gives_a_program_or_one_of_our_errors(data):
    raw = json.loads(dumps(program_to_json(PIPELINE)))
    key = data.draw(st.sampled_from(sorted(raw)))
    raw[key] = data.draw(_JSON)
    try:
        verify(program_from_json(raw), modules={"transformer": MODULE})
    except DiffkilnError:
        return


@pytest.mark.parametrize("raw", [None, [], {}, {"ops": 1}, "x", {"component": 1}])
def test_what_is_no_program_is_refused(raw):
    for read in (program_from_json, module_from_json):
        with pytest.raises(DiffkilnError):
            read(raw)


def test_marks_that_are_no_texts_are_refused():
    data = program_to_json(PIPELINE)
    data["texts"][0]["marks"] = ["<image>"]
    assert program_from_json(data).texts[0]["marks"] == ["<image>"]
    data["texts"][0]["marks"] = [1]
    with pytest.raises(DiffkilnError):
        program_from_json(data)


def test_listing_says_what_is_tokenized_by_character():
    row = {"keyword": "prompt", "index": 0, "prefix": "", "suffix": ""}
    text = {"tokenizer": "tokenizer", "rows": [row], "transforms": ["lower"], "max_length": 8}
    assert text_line(text).endswith("tokenizer (lower, 8 tokens)")
    assert text_line(text | {"quotations": "characters"}).endswith(
        "tokenizer (lower, quotations by character, 8 tokens)"
    )


def test_listing_is_for_people():
    text = listing(PIPELINE)
    assert "%1 float32[2,4] = noise(" in text
    assert "tokenizer" in text
    assert "'<' prompt '>'" in text
    assert "guidance_scale" in text
    assert "return %5" in text
    whole = module_listing(MODULE)
    assert "component transformer" in whole
    assert "region=Block, instance=blocks.1" in whole
    assert F4.dtype in whole
