"""batches: which inputs follow the batch is what the pipeline says when there are twice as many prompts."""

from __future__ import annotations

import pytest
import torch

from diffkiln.compiler.compile import check
from diffkiln.errors import RecordError
from diffkiln.interpreter.quiet import quiet_libraries
from diffkiln.record.batches import _following, _halved, rebatch
from diffkiln.record.components import Callee
from diffkiln.record.constants import Constants
from diffkiln.record.pipeline import Recording, record
from diffkiln.record.structure import flatten
from tests.passes.test_cache_schedule import spec
from tests.pipelines import WARNING_FILTERS

pytestmark = [pytest.mark.filterwarnings(text) for text in WARNING_FILTERS]


def test_the_pipeline_says_which_inputs_follow_the_batch(families):
    made = spec(families, "flux")
    made["passes"], made["inputs"]["num_inference_steps"] = [], 2
    checked = check(made)
    with quiet_libraries():
        recording = record(checked.pipe, checked.requests, Constants())
        more, found = rebatch(recording, "transformer", double=True)
    doubled = found["transformer"]
    callee = more.callees["transformer", "transformer.doubled"]
    folded = [follows for follows, at in zip(doubled.follows, callee.tensors, strict=True) if at in callee.folded]
    assert folded == [False, False]  # the positions of the text and of the image
    program = more.modules["transformer"].programs["transformer.doubled"]
    assert {item.name: item.type.shape[0] for item in program.inputs} == {
        "%hidden_states": 2,
        "%timestep": 2,  # of one row, too, it is one for each
        "%guidance": 2,
        "%pooled_projections": 2,
        "%encoder_hidden_states": 2,
    }
    assert recording.modules["transformer"].programs.keys() == {"transformer"}
    assert (
        more.modules["transformer"].programs["transformer"] == recording.modules["transformer"].programs["transformer"]
    )


def callee(*shapes: tuple[int, ...]) -> Callee:
    leaves, structure = flatten((([torch.empty(shape) for shape in shapes],), {}))
    return Callee("net", "forward", torch.nn.Identity(), lambda x: x, leaves, structure, ([], None))


def test_an_input_follows_where_its_first_dimension_doubles():
    assert _following(callee((1, 3), (1, 3), ()), callee((2, 3), (1, 3), ())) == (True, False, False)


@pytest.mark.parametrize(
    ("many", "reason"),
    [
        (callee((1, 3), (1, 3)), "is given 1 tensors, and 2 for twice as many prompts: a list of them is its batch"),
        (callee((1, 6)), r"x of net is float32\[1,3\], and float32\[1,6\] for twice as many prompts"),
    ],
)
def test_a_batch_that_is_no_first_dimension_is_refused(many, reason):
    with pytest.raises(RecordError, match=reason):
        _following(callee((1, 3)), many)


def test_an_odd_batch_has_no_halves():
    with pytest.raises(RecordError, match="has no halves"):
        _halved(callee((1, 3)), callee((2, 3)), (True,), Recording([], {}, Constants(), []))
