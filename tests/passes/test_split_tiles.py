"""split_tiles: what a wrong spec is told, and the programs that it makes. See tests/passes/tiling for the tiles."""

from __future__ import annotations

from typing import Any

import pytest

from diffkiln.compiler.check import check
from diffkiln.errors import IllegalPlan, PassError
from diffkiln.program.ir import ALL_GATHER
from tests.parallel.specs import exchange_of, shared, shared_calls_of, tiled
from tests.pipelines import WARNING_FILTERS

pytestmark = [pytest.mark.filterwarnings(text) for text in WARNING_FILTERS]
TWO = {"sequence": 2, "tiles": True}


def refused(made: dict[str, Any]) -> str:
    with pytest.raises(IllegalPlan) as caught:
        check(made)
    return str(caught.value)


def test_the_target_adds_the_pass_for_the_decoder(families):
    report = check(tiled(families, TWO)).report
    rows = {ran.listed.step.name: (ran.listed.where, ran.listed.step.component) for ran in report}
    assert rows["split_tiles"] == ("$.target.parallel.tiles", "vae")


def test_an_image_that_is_decoded_in_one_piece_is_refused(families):
    reason = refused(shared(families, "flux", TWO))
    assert "$.target.parallel.tiles: vae decodes an image in one piece" in reason
    assert '{"name": "vae", "component": "vae", "tiling": true}' in reason


def test_a_decoder_that_is_compiled_whole_is_refused(families):
    made = tiled(families, TWO)
    made["passes"].append({"name": "compile", "component": "vae", "scope": "whole"})
    assert "compile takes vae whole, and processes exchange tensors within it" in refused(made)


def test_the_list_agrees_with_the_target(families):
    made = tiled(families, {})
    made["passes"].append({"name": "split_tiles", "component": "vae", "sequence": 2})
    assert "$.passes[1]: the target has one process" in refused(made)


def test_tiles_of_which_no_two_are_alike_are_refused(families):
    made = tiled(families, TWO)
    made["inputs"] |= {"height": 32, "width": 48}
    with pytest.raises(PassError, match="vae has no two tiles of one size"):
        exchange_of(made)


def test_each_process_decodes_every_second_tile(families):
    """An image of 64 pixels in tiles of 32 that begin at 0, 24 and 48: four whole, two high, two wide, a small one."""
    ((call,),) = [list(programs.values())[:1] for programs in shared_calls_of(tiled(families, TWO)).values()]
    program = next(iter(call.modules["vae"].programs.values()))
    alone = next(iter(call.alone_modules["vae"].programs.values()))
    assert sum(op.name == ALL_GATHER for op in program.ops) == 2 + 1 + 1
    convolutions = [sum("conv" in op.name for op in each.ops) for each in (program, alone)]
    assert convolutions[0] * 9 == convolutions[1] * 5
    assert call.exchanged[-1].count == 4
