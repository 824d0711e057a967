"""Files that are whole by their digests and wrong in themselves: what fuzzing has found."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import save

from diffkiln.errors import ManifestInvalid, VerifyError
from diffkiln.program import ATTENTION, Module, Op, Ref, module_to_json, program_to_json
from diffkiln.runtime.loading import CONSTANTS, read_constants, read_modules, read_variant
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
