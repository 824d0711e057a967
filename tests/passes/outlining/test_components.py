"""Components as one region, and with regions between their blocks: they give what they gave."""

import pytest

from diffkiln.passes.outlining import between_blocks, whole
from diffkiln.program import REGION, verify_module, verify_types
from tests.end_to_end.test_families import spec_of
from tests.passes.outlining.replays import component_gives, recorded, same
from tests.pipelines import WARNING_FILTERS

pytestmark = [pytest.mark.filterwarnings(text) for text in WARNING_FILTERS]


@pytest.fixture(scope="module", params=["flux", "sdxl"])
def recording(request, families):
    return recorded(spec_of(request.param, families))


def denoiser(recording):
    (name,) = {"transformer", "unet"} & recording.modules.keys()
    return recording.modules[name]


def test_whole_component_is_one_region_that_gives_the_same(recording):
    module = denoiser(recording)
    outlined = whole(module)
    verify_module(outlined)
    assert list(outlined.regions) == list(module.programs)
    for name, program in outlined.programs.items():
        verify_types(program, outlined.regions)
        assert [op.name for op in program.ops] == [REGION]
        assert all(op.is_aten for op in outlined.regions[name].ops)
        assert same(component_gives(outlined, name, recording), component_gives(module, name, recording))


def test_runs_between_blocks_become_regions_that_give_the_same(recording):
    module = denoiser(recording)
    outlined = between_blocks(module)
    verify_module(outlined)
    assert outlined.regions.keys() > module.regions.keys()
    for name, program in outlined.programs.items():
        verify_types(program, outlined.regions)
        blocks = [op.attrs["instance"] for op in module.programs[name].ops if op.name == REGION]
        assert [op.attrs["instance"] for op in program.ops if op.name == REGION and op.attrs["instance"]] == blocks
        assert sum(op.is_aten for op in program.ops) < sum(op.is_aten for op in module.programs[name].ops) / 4
        assert same(component_gives(outlined, name, recording), component_gives(module, name, recording))


def test_what_lies_between_takes_its_weights_as_inputs(recording):
    outlined = between_blocks(denoiser(recording))
    own = [region for name, region in outlined.regions.items() if name.startswith("between")]
    assert own
    assert not any(region.weights or region.constants for region in own)
