"""Blocks of modular pipelines at a fixed length: prompts of any length give what diffusers gives."""

import pytest
import torch

import diffkiln
from diffkiln.interpreter.quiet import quiet_libraries
from tests.coverage.calls import CALLS
from tests.coverage.calls.measure import drawn, reference_of, spec_of
from tests.families.test_fixed_lengths import PROMPTS
from tests.pipelines import WARNING_FILTERS
from tests.portably import as_recorded

pytestmark = [
    pytest.mark.more,
    *(pytest.mark.filterwarnings(line) for line in WARNING_FILTERS),
]


@pytest.mark.parametrize(
    "name", ["wan_modular", "z_image_modular", "qwen_image_modular", "ernie_image_modular", "helios"]
)
def test_equals_diffusers_for_prompts_of_any_length(name, tmp_path):
    family = CALLS[name]
    with quiet_libraries():
        family.build().save_pretrained(str(tmp_path / "model"))
        reference = reference_of(tmp_path / "model")
    reference.set_progress_bar_config(disable=True)
    spec = spec_of(family, tmp_path / "model")
    built = diffkiln.compile(spec, tmp_path / "bundle")
    with diffkiln.load(built.path) as pipe, torch.no_grad(), as_recorded():
        for count in (1, 20, 200):
            wanted, found = (
                drawn(each, family, spec, count, PROMPTS[count], like=reference) for each in (reference, pipe)
            )
            assert float((wanted - found).abs().max()) <= 1e-5, count
