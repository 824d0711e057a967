"""split_sequence: what a wrong spec is told, and the programs that it makes."""

from __future__ import annotations

from typing import Any

import pytest

from diffkiln.compiler.compile import check
from diffkiln.errors import IllegalPlan, PassError
from diffkiln.passes.sequencing.layout import Layout
from diffkiln.program import CALL, Program
from tests.parallel.specs import exchange_of, shared, shared_calls_of
from tests.pipelines import WARNING_FILTERS

pytestmark = [pytest.mark.filterwarnings(text) for text in WARNING_FILTERS]
TWO = {"sequence": 2}


def refused(made: dict[str, Any]) -> str:
    with pytest.raises(IllegalPlan) as caught:
        check(made)
    return str(caught.value)


def test_a_slice_that_begins_and_ends_with_segments_has_a_layout():
    layout = Layout(1, (32, 16, 8))
    assert layout.within(32, 48) == Layout(1, (16,))
    assert layout.within(0, 48) == Layout(1, (32, 16))
    assert layout.within(16, 48) is None
    assert layout.within(32, 40) is None


def test_the_target_adds_the_pass_for_the_denoiser(families):
    (ran,) = check(shared(families, "flux", TWO)).report
    assert (ran.listed.where, ran.listed.step.name) == ("$.target.parallel.sequence", "split_sequence")


def test_the_list_agrees_with_the_target(families):
    made = shared(families, "flux", {})
    made["passes"] = [{"name": "split_sequence", "component": "transformer", "count": 2}]
    assert "$.passes[0]: the target shares a sequence among 1 processes, not 2" in refused(made)


def test_it_is_for_a_denoiser(families):
    made = shared(families, "flux", TWO)
    made["passes"] = [{"name": "split_sequence", "component": "vae", "count": 2}]
    assert "vae is not a part of the denoising run" in refused(made)


def test_a_component_that_is_compiled_whole_is_not_split(families):
    made = shared(families, "flux", TWO)
    made["passes"] = [{"name": "compile", "component": "transformer", "scope": "whole"}]
    assert "compile takes transformer whole, and processes exchange tensors within it" in refused(made)


def test_heads_that_do_not_divide_are_refused_with_the_numbers(families):
    with pytest.raises(PassError, match="has 2 heads, which 4 processes cannot share evenly"):
        exchange_of(shared(families, "flux", {"sequence": 4}))


def test_tokens_that_do_not_divide_are_refused_with_the_numbers(families):
    made = shared(families, "flux", TWO)
    made["inputs"] |= {"height": 48, "width": 48}
    with pytest.raises(PassError, match="has 9 tokens, which 2 processes cannot share evenly"):
        exchange_of(made)


def test_what_is_sent_is_what_the_attentions_exchange(families):
    """FLUX: four blocks, each of which exchanges queries, keys, values and results [1, 48, 32], half of a half, the
    first three at once; and the tokens of the result are gathered once."""
    (programs,) = exchange_of(shared(families, "flux", TWO, 1)).values()
    (step, after) = programs["call"]
    exchanged = 4 * 4 * (24 * 32 * 4 // 2)
    assert step.count == 4 * 2 + 1
    assert step.nbytes == exchanged + 8 * 64 * 4
    assert (after.nbytes, after.count) == (0, 0)


def test_calls_that_are_made_ahead_are_shared(families):
    """FLUX: three steps, of whose calls each process makes one of two, and both make the third. Seven results of three
    sizes are gathered in three exchanges before the first step."""
    made = shared(families, "flux", TWO, 3)
    made["passes"] = [{"name": "hoist", "component": "transformer", "batch": False}]
    (programs,) = shared_calls_of(made).values()
    call = programs["call"]

    def ahead(program: Program) -> int:
        return sum(op.name == CALL and op.attrs["program"] == "transformer.timed" for op in program.ops)

    assert (ahead(call.alone), ahead(call.call)) == (3, 2)
    first, *others, after = call.exchanged
    assert first.nbytes - others[0].nbytes == (4 * 192 + 2 * 96 + 64) * 4
    assert first.count - others[0].count == 3
    assert (after.nbytes, after.count) == (0, 0)


@pytest.mark.parametrize("family", ["lumina2", "cogvideox"])
def test_repeated_heads_and_writes_to_some_of_the_tokens_are_shared(family, families):
    """Lumina 2 repeats the heads of its keys; CogVideoX turns the tokens of the image alone, in a view of all."""
    (programs,) = exchange_of(shared(families, family, TWO, 1)).values()
    assert programs["call"][0].count > 0
