"""run_on_first: what a wrong spec is told, and what is left for the other processes."""

from __future__ import annotations

from typing import Any

import pytest

from diffkiln.compiler.check import check
from diffkiln.errors import IllegalPlan, SpecError
from diffkiln.program import CALL, FROM_FIRST, for_others
from tests.parallel.specs import shared, shared_calls_of, tiled
from tests.pipelines import WARNING_FILTERS

pytestmark = [pytest.mark.filterwarnings(text) for text in WARNING_FILTERS]
ENCODERS = ["text_encoder", "text_encoder_2"]
TWO = {"sequence": 2, "first": ENCODERS}


def refused(made: dict[str, Any]) -> str:
    with pytest.raises(IllegalPlan) as caught:
        check(made)
    return str(caught.value)


def test_a_component_that_the_pipeline_lacks_is_refused_where_it_is_named(families):
    reason = refused(shared(families, "flux", {**TWO, "first": ["text_encoder_3"]}))
    assert "$.target.parallel.first: FluxPipeline has no component 'text_encoder_3'" in reason


def test_the_denoiser_is_refused(families):
    reason = refused(shared(families, "flux", {**TWO, "first": ["transformer"]}))
    assert "transformer is the denoiser, which all processes share" in reason


def test_one_process_alone_has_no_first(families):
    with pytest.raises(SpecError, match=r"parallel.*is one process"):
        check(shared(families, "flux", {"first": ENCODERS}))


def test_a_decoder_whose_tiles_are_shared_is_not_the_first_processs_own(families):
    assert "split_tiles has all processes run vae" in refused(tiled(families, {**TWO, "tiles": True, "first": ["vae"]}))


def test_the_list_agrees_with_the_target(families):
    made = shared(families, "flux", {"sequence": 2})
    made["passes"] = [{"name": "run_on_first", "component": "vae", "count": 2}]
    assert "$.passes[0]: the target does not ask for it" in refused(made)


def test_the_others_hold_no_weights_for_it_and_are_sent_what_it_gives(families):
    """FLUX uses the pooled result [1, 32] of one encoder and all tokens [1, 16, 32] of the other."""
    made = shared(families, "flux", TWO, 1)
    (programs,) = shared_calls_of(made).values()
    call = programs["call"]
    plain = shared(families, "flux", {"sequence": 2}, 1)
    (others,) = shared_calls_of(plain).values()
    given = [call.call.types[op.outputs[0]] for op in call.call.ops if op.name == FROM_FIRST]
    assert len(given) == 2
    sent = sum(4 * type_.numel for type_ in given)
    assert call.exchanged[0].nbytes - others["call"].exchanged[0].nbytes == sent
    called = {op.attrs["component"] for op in for_others(call.call).ops if op.name == CALL}
    assert called == {"transformer", "vae"}
    sizes = check(made).bytes_after
    assert call.held == (sum(sizes.values()), sizes["transformer"] + sizes["vae"])
