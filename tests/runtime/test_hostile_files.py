"""Files that are whole by their digests and wrong in themselves: what fuzzing has found."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import save

from diffkiln.bundle.layout import CONSTANTS
from diffkiln.errors import LimitExceeded, ManifestInvalid, VerifyError
from diffkiln.interpreter.dtypes import dtype_of, format_of
from diffkiln.program import ATTENTION, Input, Module, Op, Program, Ref, module_to_json, program_to_json
from diffkiln.runtime.opening import read_constants, read_modules, read_variant
from diffkiln.runtime.tables import read_header
from diffkiln.runtime.texts import check_texts
from tests.fuzz.harnesses import Held
from tests.program.programs import BODY, F4, MODULE, PIPELINE

CALL_FILE, FILE = "programs/call.json", "programs/transformer.json"


@pytest.mark.parametrize(
    "content", [None, True, [], "text", {}, {"programs": None}, {"programs": []}, {"programs": {"other": {}}}]
)
def test_variants_file_without_the_program_that_the_manifest_names_is_refused(content):
    held: Any = Held({CALL_FILE: json.dumps(content).encode()}, {"call": CALL_FILE})
    with pytest.raises(ManifestInvalid, match="holds no program 'call', which variant 'v0' names"):
        read_variant(held, 0, {"transformer": MODULE})


def test_variants_program_is_read():
    held: Any = Held(
        {CALL_FILE: json.dumps({"programs": {"call": program_to_json(PIPELINE)}}).encode()}, {"call": CALL_FILE}
    )
    assert read_variant(held, 0, {"transformer": MODULE}).programs == {"call": PIPELINE}


def test_constants_of_a_type_that_none_has_are_refused():
    held: Any = Held({CONSTANTS: save({"abc": torch.zeros(2, dtype=torch.uint16)})})
    with pytest.raises(ManifestInvalid, match=r"'abc' is of the type U16"):
        read_constants(held)


def test_an_operation_may_not_pass_for_a_call_of_a_region_by_its_attributes():
    """Attributes that no rule names are not looked at: a list among them, or a region's name, means nothing."""
    query = Ref("%x")
    for stray in ([1], "Block"):
        attrs = {"kernel": "xformers", "causal": False, "scale": None, "region": stray}
        op = Op(ATTENTION, (query, query, query), ("%9",), attrs=attrs)
        body = replace(BODY, ops=(*BODY.ops, op), types={**BODY.types, "%9": F4})
        module = Module("transformer", {"transformer": body}, MODULE.regions)
        held: Any = Held({FILE: json.dumps(module_to_json(module)).encode()})
        try:
            assert read_modules(held) == {"transformer": module}
        except VerifyError as error:
            pytest.fail(str(error))


def test_header_of_more_rows_than_the_limits_allow_is_refused():
    row = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    header = json.dumps({str(number): row for number in range(70_000)}).encode()
    held: Any = Held({"w": struct.pack("<Q", len(header)) + header, CONSTANTS: struct.pack("<Q", len(header)) + header})
    with pytest.raises(LimitExceeded, match="w: header_rows is 70,000, and 65,536 is allowed"):
        read_header(held, "w")
    with pytest.raises(LimitExceeded, match="header_rows is 70,000"):
        read_constants(held)
    long: Any = Held({"w": struct.pack("<Q", 17 << 20) + b" " * (17 << 20)})
    with pytest.raises(LimitExceeded, match="header_bytes is 17,825,792, and 16,777,216 is allowed"):
        read_header(long, "w")


TEXT: dict[str, Any] = {
    "tokenizer": "tokenizer", "rows": [{"keyword": "prompt", "index": 0, "prefix": "", "suffix": ""}], "transforms": [],
    "padding": "max_length", "max_length": 8, "truncation": True, "add_special_tokens": True, "padding_side": "right",
    "truncation_side": "right", "pad_id": 0, "pad_token": "<pad>", "pad_type_id": 0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "error", "says"),
    [
        ({"max_length": 2**33}, LimitExceeded, r"text 0 of program 'call': tokens is 8,589,934,592, and 262,144"),
        ({"rows": [{"text": "a"}] * 40_000}, LimitExceeded, "tokens is 320,000"),
        ({"rows": [{"text": "a" * 10**6}]}, LimitExceeded, "text_chars is 1,000,000"),
        ({"tokenizer": "other"}, ManifestInvalid, "names the tokenizer 'other', which the bundle does not have"),
        ({"transforms": ["exec"]}, ManifestInvalid, r"\$\.transforms\[0\]"),
        ({"pad_id": -1}, ManifestInvalid, r"\$\.pad_id"),
        ({"pad_id": 2**40}, ManifestInvalid, r"\$\.pad_id"),
        ({"pad_id": None}, ManifestInvalid, "names neither length nor padding"),
        ({"padding_side": "up"}, ManifestInvalid, r"\$\.padding_side"),
        ({"rows": []}, ManifestInvalid, r"\$\.rows"),
    ],
)
def test_text_that_asks_for_too_much_or_is_none_is_refused_before_a_prompt_comes(changed, error, says):
    program = Program("call", (), (), (), {}, (TEXT | changed,))
    check_texts(replace(program, texts=(TEXT,)), {"tokenizer"})
    with pytest.raises(error, match=says):
        check_texts(program, {"tokenizer"})


def test_tokens_that_no_tokenizer_gives_are_refused():
    item = Input("%x", F4, {"kind": "tokens", "text": 0, "key": "pixels"})
    with pytest.raises(ManifestInvalid, match="a tokenizer gives no 'pixels'"):
        check_texts(Program("call", (item,), (), (), {"%x": F4}, (TEXT,)), {"tokenizer"})


@pytest.mark.parametrize("name", ["load", "nn", "_dynamo", "Tensor", None, ["float32"]])
def test_names_of_types_and_formats_are_looked_up_in_tables(name):
    with pytest.raises(VerifyError, match="torch has no dtype"):
        dtype_of(name)
    with pytest.raises(VerifyError, match="no memory format"):
        format_of(str(name))
