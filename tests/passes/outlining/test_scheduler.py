"""The arithmetic between the denoiser's calls as a component: it gives what it gave, in few regions."""

import pytest

from diffkiln.passes.outlining import SCHEDULER, between_calls
from diffkiln.program import CALL, STEP, verify, verify_call_types
from tests.end_to_end.test_families import spec_of
from tests.passes.outlining.replays import call_gives, recorded, same
from tests.pipelines import WARNING_FILTERS

pytestmark = [pytest.mark.filterwarnings(text) for text in WARNING_FILTERS]


def with_steps(families, family, steps, **call):
    made = spec_of(family, families)
    made["inputs"]["num_inference_steps"] = steps
    made["inputs"]["call"] |= call
    return made


@pytest.mark.parametrize("family", ["flux", "sd", "sd3", "cogvideox"])
def test_call_gives_the_same(family, families):
    recording = recorded(with_steps(families, family, 4))
    outlined = between_calls(recording)
    parts = outlined.modules[SCHEDULER].programs
    for name, call in outlined.calls[0].items():
        verify(call, modules=outlined.modules)
        verify_call_types(call, outlined.modules)
        assert same(call_gives(outlined, call), call_gives(recording, recording.calls[0][name]))
        assert same(call_gives(outlined, call, 5.0), call_gives(recording, recording.calls[0][name], 5.0))
    assert parts


def test_solver_of_one_step_needs_the_same_regions_for_any_number_of_steps(families):
    few, many = (between_calls(recorded(with_steps(families, "sd3", steps))).modules for steps in (3, 9))
    assert few[SCHEDULER].regions.keys() == many[SCHEDULER].regions.keys()


def test_nothing_is_left_in_the_loop_but_calls_and_what_is_not_worth_one(families):
    recording = between_calls(recorded(with_steps(families, "flux", 4)))
    ops = recording.calls[0]["call"].ops
    ends = [index for index, op in enumerate(ops) if op.name == STEP]
    loop = [op.name for op in ops[ends[0] : ends[-1] + 1]]
    assert set(loop) == {CALL, STEP}


def test_guidance_may_still_be_changed_by_the_caller(families):
    made = with_steps(families, "sd", 3)
    made["inputs"]["guidance_scale"] = 3.0
    recording = between_calls(recorded(made))
    call = recording.calls[0]["call"]
    assert [item.source["keyword"] for item in call.inputs if item.source["kind"] == "scalar"] == ["guidance_scale"]
    assert not same(call_gives(recording, call, 3.0), call_gives(recording, call, 4.0))


def test_loop_that_has_no_arithmetic_is_refused(families):
    recording = recorded(with_steps(families, "flux", 3))
    from dataclasses import replace

    from diffkiln.program import prune

    call = recording.calls[0]["call"]
    calls = [{"call": prune(replace(call, ops=call.ops[:1], outputs=call.ops[0].results))}]
    with pytest.raises(ValueError, match="nothing between the denoiser's calls"):
        between_calls(replace(recording, calls=calls))
