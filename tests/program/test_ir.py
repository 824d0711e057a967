"""The intermediate representation: what programs use, renaming, and what is dead."""

from __future__ import annotations

from dataclasses import replace

from diffkiln.program import Input, Op, Ref, TensorType, map_refs, prune, refs, rename, verify
from tests.program.programs import BLOCK, BODY, F4, MODULE, PIPELINE


def test_weights_and_constants_come_in_order_of_their_first_use():
    assert BLOCK.weights == ("proj.weight",)
    assert BLOCK.constants == ("abc",)
    assert list(BLOCK.uses()) == ["%x", "@proj.weight", "%1", "#abc", "%2"]


def test_references_are_found_in_nests():
    nest = (Ref("%a"), [Ref("%b"), {"c": (Ref("%c"), 1)}], "text", None)
    assert [ref.name for ref in refs(nest)] == ["%a", "%b", "%c"]
    assert map_refs(nest, lambda ref: ref.name) == ("%a", ("%b", {"c": ("%c", 1)}), "text", None)


def test_renaming_reaches_inputs_results_types_and_the_signature():
    renamed = rename(BLOCK, {"%x": "%y", "%2": "%out"})
    verify(renamed)
    assert renamed.inputs[0].name == "%y"
    assert renamed.outputs == (Ref("%out"),)
    assert renamed.signature["args"] == (Ref("%y"),)
    assert renamed.signature["result"] == (Ref("%out"),)
    assert "%x" not in renamed.types
    assert BLOCK.inputs[0].name == "%x"


def test_dead_operations_go_and_noise_and_steps_stay():
    lazy = replace(PIPELINE, outputs=(Ref("%1"),))
    assert [op.name for op in prune(lazy).ops] == [op.name for op in PIPELINE.ops]  # the step needs them all
    unused = replace(
        BODY, ops=(*BODY.ops, Op("aten.neg.default", (Ref("%x"),), ("%9",))), types={**BODY.types, "%9": F4}
    )
    assert prune(unused) == BODY


def test_types_print_shortly_and_count_elements():
    assert str(TensorType("bfloat16", (1, 2, 3))) == "bfloat16[1,2,3]"
    assert TensorType("int8", (2, 3)).numel == 6
    assert TensorType("int8", ()).numel == 1


def test_programs_of_all_levels_verify():
    for region in MODULE.regions.values():
        verify(region)
    verify(BODY, regions=MODULE.regions)
    verify(PIPELINE, modules={"transformer": MODULE})
    assert Input("%x", F4).source == {}
