"""What a program's name says on disk is a field once it is read; the programs of a call are found by what is given."""

from __future__ import annotations

from dataclasses import replace

import pytest

from diffkiln.program import Builder, Module, is_rebatched, program_from_json, program_to_json
from diffkiln.program.batches import DOUBLED, HALVED, named_with
from diffkiln.program.calls import GIVEN, Given
from tests.program.programs import BODY


@pytest.mark.parametrize("batch", [DOUBLED, HALVED])
def test_the_batch_of_a_program_is_read_from_its_name_and_kept_by_edits(batch):
    program = replace(BODY, name=named_with("transformer", batch))
    read = program_from_json(program_to_json(Builder(program, name=f"{program.name}.keeping", batch=batch).build()))
    assert (read.name, read.batch) == (f"transformer.{batch}.keeping", batch)
    assert Builder(read, name="another").build().batch == batch


def test_a_component_is_at_another_batch_where_all_of_its_programs_are():
    other = replace(BODY, batch=DOUBLED)
    assert is_rebatched(Module("transformer", {"a": other}))
    assert not is_rebatched(Module("transformer", {"a": other, "transformer.doubled": BODY}))
    assert not is_rebatched(Module("transformer", {}))
    assert program_from_json(program_to_json(BODY)).batch == ""


def test_programs_of_a_call_are_found_by_what_is_given():
    assert list(GIVEN) == ["call", "call+negative", "call+latents", "call+negative+latents"]
    assert GIVEN["call+negative+latents"] == Given(negative=True, latents=True)
    assert all(given.name == name for name, given in GIVEN.items())
