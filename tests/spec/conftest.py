import copy
from typing import Any

import pytest

# The example of the documentation, field for field.
EXAMPLE: dict[str, Any] = {
    "$schema": "urn:diffkiln:spec:1",
    "spec_version": 1,
    "source": {"model": "black-forest-labs/FLUX.1-dev", "revision": "0" * 40, "dtype": "bfloat16"},
    "target": {"device": "cuda", "gpu": "nvidia-rtx-4090"},
    "inputs": {
        "height": 1024,
        "width": 1024,
        "batch_size": 1,
        "num_inference_steps": 28,
        "guidance_scale": 3.5,
        "call": {"prompt": "a kiln at night", "max_sequence_length": 512},
    },
    "passes": [
        {"name": "fuse_qkv", "component": "transformer"},
        {
            "name": "quantize",
            "component": "transformer",
            "backend": "torchao",
            "type": "int8_weight_only",
            "exclude": ["*norm*"],
        },
        {"name": "cache_schedule", "component": "transformer", "method": "fora", "interval": 2},
        {"name": "compile", "component": "transformer", "backend": "aot_inductor", "scope": "blocks"},
    ],
    "runtime": {"offload": {"strategy": "group", "type": "block_level", "num_blocks_per_group": 1, "use_stream": True}},
}


@pytest.fixture
def example() -> dict[str, Any]:
    return copy.deepcopy(EXAMPLE)
