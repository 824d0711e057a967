"""How a target says that several processes share a call."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from diffkiln.spec import TargetSpec

GPU = {"device": "cuda", "gpu": "nvidia-h100-sxm"}


def test_the_counts_are_those_of_axes_with_several_processes():
    target = TargetSpec.model_validate({**GPU, "gpus": 2, "parallel": {"guidance": 2}})
    assert target.parallel is not None
    assert target.parallel.counts == {"guidance": 2}


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ({**GPU, "gpus": 4}, "does not say how 4 GPUs share a call"),
        ({**GPU, "gpus": 4, "parallel": {"guidance": 2}}, 'is 4, and "parallel" shares a call among 2 processes'),
        ({"device": "cpu", "gpus": 2}, "says something of a GPU, and the device is a CPU"),
        ({"device": "cpu", "parallel": {"guidance": 1}}, "is one process"),
        ({"device": "cpu", "parallel": {"guidance": 3}}, "less than or equal to 2"),
    ],
)
def test_a_wrong_number_is_refused(target, reason):
    with pytest.raises(ValidationError) as caught:
        TargetSpec.model_validate(target)
    assert reason in str(caught.value)
