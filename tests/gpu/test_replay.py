"""Programs recorded on a CPU, replayed on a GPU with weights streamed from host memory."""

from __future__ import annotations

import pytest
import torch

import diffkiln
from diffkiln.interpreter.quiet import quiet_libraries
from tests.end_to_end.test_families import spec_of
from tests.pipelines import WARNING_FILTERS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU"),
    *(pytest.mark.filterwarnings(text) for text in WARNING_FILTERS),
]


@pytest.mark.parametrize("where", [None, "host", "disk"])
@pytest.mark.parametrize("family", ["flux", "sdxl"])
def test_replay_on_the_gpu_equals_diffusers_on_the_gpu(family, where, tmp_path):
    from diffusers import DiffusionPipeline

    spec = spec_of(family, tmp_path)
    if where:
        spec["runtime"] = {"offload": {"num_blocks_per_group": 1, "to": where}}
        spec["target"] = {"device": "cuda", "gpu": "nvidia-h200"}
    built = diffkiln.compile(spec, tmp_path / "bundle")
    given = {key: value for key, value in spec["inputs"].items() if key != "call"} | spec["inputs"]["call"]
    with quiet_libraries():
        reference = DiffusionPipeline.from_pretrained(spec["source"]["model"]).to("cuda")
        reference.set_progress_bar_config(disable=True)
        want = reference(prompt="a red fox", generator=torch.Generator().manual_seed(1), output_type="pt", **given)
    with diffkiln.load(built.path, device="cuda") as pipe:
        got = pipe("a red fox", generator=torch.Generator().manual_seed(1), output_type="pt", **given)
        if where:
            assert pipe.executor.store.groups_peak <= 3
            assert pipe.executor.store.bytes_now == 0
    torch.testing.assert_close(got.images, want.images, atol=2 / 255, rtol=0)
