"""The call of a pipeline as diffusers, before its bundle is published."""

import pytest
import torch

import diffkiln
from diffkiln.compiler.trial import _drawn
from diffkiln.compiler.verify import Verification
from diffkiln.errors import DiffkilnError, VerifyError
from diffkiln.record.call import Request
from tests.pipelines import WARNING_FILTERS, build_folder

pytestmark = [pytest.mark.filterwarnings(line) for line in WARNING_FILTERS]


class Graded:
    """Goes by gradients to its result."""

    def __call__(self, prompt):
        with torch.enable_grad():
            x = torch.ones(1, requires_grad=True)
            (2 * x * len(prompt)).sum().backward()
        return x.grad


class Deep:
    """Makes pictures that Pillow does not take, as numbers alone."""

    def __call__(self, prompt, output_type="pil"):
        if output_type == "pil":
            raise ValueError("these pictures have six channels")
        return prompt


class Fussy:
    def __call__(self, prompt, output_type="pil"):
        raise ValueError("this prompt is no JSON")


def test_a_pipeline_that_turns_gradients_on_is_called():
    assert _drawn(Graded(), Request({}), False) == ""


def test_numbers_suffice_where_pictures_cannot_be_made():
    assert _drawn(Deep(), Request({}), False) == ""


def test_a_pipeline_that_fails_either_way_is_told():
    assert "without a reason" in _drawn(Fussy(), Request({}), False)


def test_a_program_that_is_not_the_pipelines_call_runs_as_diffusers_where_the_spec_has_it(tmp_path, monkeypatch):
    def differs(*_):
        raise VerifyError("the recorded call differs from the pipeline's own")

    monkeypatch.setattr(Verification, "check_calls", differs)
    inputs = {"height": 64, "width": 64, "num_inference_steps": 1, "call": {"max_sequence_length": 32}}
    spec = {"spec_version": 1, "source": {"model": str(build_folder("flux", tmp_path))}, "target": {"device": "cpu"}}
    spec |= {"inputs": inputs}
    with pytest.raises(VerifyError, match="differs"):
        diffkiln.compile(spec, tmp_path / "refused")
    built = diffkiln.compile(spec | {"runtime": {"on_unrecordable": "diffusers"}}, tmp_path / "bundle")
    with pytest.raises(DiffkilnError, match="runs only as diffusers"):
        diffkiln.load(built.path)
    assert type(diffkiln.load(built.path, as_diffusers=True)).__name__ == "FluxPipeline"
