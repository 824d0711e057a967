"""split_layers: what a wrong spec is told, and the programs that it makes."""

from __future__ import annotations

from typing import Any

import pytest

from diffkiln.compiler.check import check
from diffkiln.errors import IllegalPlan, PassError, SpecError
from diffkiln.program import FROM_ONE, REGION, Module, Program
from diffkiln.program.layers import own_modules, shared_out, sizes_of
from tests.parallel.specs import shared, shared_calls_of
from tests.pipelines import WARNING_FILTERS

pytestmark = [pytest.mark.filterwarnings(text) for text in WARNING_FILTERS]
TWO = {"layers": 2}


def refused(made: dict[str, Any]) -> str:
    with pytest.raises(IllegalPlan) as caught:
        check(made)
    return str(caught.value)


def blocks_of(module: Module) -> set[str]:
    return {op.attrs["instance"] for program in module.programs.values() for op in program.ops if op.name == REGION}


def test_ranges_are_as_even_as_they_can_be():
    assert [*shared_out(dict.fromkeys("abcde", 1), 3).values()] == [0, 0, 1, 1, 2]
    assert [*shared_out({"a": 10, "b": 1, "c": 1}, 3).values()] == [0, 1, 2]
    assert [*shared_out({"a": 2, "b": 2, "c": 1, "d": 1, "e": 1, "f": 1}, 2).values()] == [0, 0, 1, 1, 1, 1]
    assert [*shared_out({"a": 0, "b": 0, "c": 0}, 2).values()] == [0, 0, 1]


def test_the_target_adds_the_pass_for_the_denoiser(families):
    (ran,) = check(shared(families, "flux", TWO)).report
    assert (ran.listed.where, ran.listed.step.name) == ("$.target.parallel.layers", "split_layers")


def test_the_list_agrees_with_the_target(families):
    made = shared(families, "flux", {})
    made["passes"] = [{"name": "split_layers", "component": "transformer", "count": 2}]
    assert "$.passes[0]: the target shares out layers among 1 processes, not 2" in refused(made)


def test_a_sequence_is_refused_beside_it(families):
    with pytest.raises(SpecError, match=r"parallel\.layers: shares out whole blocks"):
        check(shared(families, "flux", {"layers": 2, "sequence": 2}))


def test_it_is_for_a_denoiser_that_is_not_compiled_whole(families):
    made = shared(families, "flux", TWO)
    made["passes"] = [{"name": "split_layers", "component": "vae", "count": 2}]
    assert "vae is not a part of the denoising run" in refused(made)
    made["passes"] = [{"name": "compile", "component": "transformer", "scope": "whole"}]
    assert "compile takes transformer whole, and processes run its blocks" in refused(made)


def test_slots_for_adapters_are_refused(families):
    made = shared(families, "flux", TWO)
    made["runtime"] = {"adapters": {"rank": 4, "slots": 1}}
    assert "split_layers cannot follow add_slots: adapters are put into the slots of all blocks" in refused(made)


def test_more_processes_than_blocks_are_refused_with_the_numbers(families):
    with pytest.raises(PassError, match="repeated blocks, which 9 processes cannot share out"):
        shared_calls_of(shared(families, "flux", {"layers": 9}, 1))


def test_each_process_runs_its_own_blocks_and_borders_are_one_exchange(families):
    (programs,) = shared_calls_of(shared(families, "flux", TWO, 1)).values()
    call = programs["call"]
    module = call.modules["transformer"]
    parts = [own_modules(call.modules, call.mesh, rank)["transformer"] for rank in range(2)]
    first, second = map(blocks_of, parts)
    assert first
    assert second
    assert not first & second
    assert first | second == blocks_of(module)
    sizes = sizes_of(module)
    around = sum(call.weights.values()) - sum(sizes.values())
    assert call.held == tuple(around + sum(sizes[name] for name in own) for own in (first, second))
    for part in parts:
        assert {op.attrs["region"] for program in part.programs.values() for op in regions(program)} == {*part.regions}
        for program in part.programs.values():
            assert [op.attrs["index"] for op in program.ops if op.name == FROM_ONE] == [0, 1]


def test_what_crosses_a_border_is_sent_whole(families):
    """Both streams of tokens leave the first range."""
    (programs,) = shared_calls_of(shared(families, "flux", TWO, 1)).values()
    call = programs["call"]
    (program,) = {id(each): each for each in call.modules["transformer"].programs.values()}.values()
    sent = [sum(program.types[name].numel for name in op.outputs) * 4 for op in program.ops if op.name == FROM_ONE]
    assert (call.exchanged[0].count, call.exchanged[0].nbytes) == (2, sum(sent))


def regions(program: Program) -> list[Any]:
    return [op for op in program.ops if op.name == REGION]
