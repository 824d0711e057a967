"""Pipelines whose shapes follow the prompt, compiled: equal to diffusers for prompts of 1, 20 and 200 tokens."""

import pytest

from tests.families.test_fixed_lengths import PROMPTS, ROUNDING, compiled, difference
from tests.pipelines import WARNING_FILTERS

pytestmark = [pytest.mark.filterwarnings(text) for text in WARNING_FILTERS]


@pytest.mark.parametrize("family", ROUNDING)
def test_compiled_blocks_give_what_diffusers_gives(family, tmp_path):
    blocks = {"name": "compile", "component": "transformer"}
    reference, pipe, given = compiled(family, tmp_path, [blocks])
    with pipe:
        classes = {row.region.partition("-")[0] for row in pipe.bundle.manifest.engines}
        assert {region for _, region in pipe.executor.engines} == set(pipe.executor.modules["transformer"].regions)
        assert classes
        for count in (1, 20, 200):
            assert difference(reference, pipe, given, prompt=PROMPTS[count], negative_prompt=PROMPTS[20]) <= 1e-4
