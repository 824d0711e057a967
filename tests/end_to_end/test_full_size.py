"""Checks of full-size models from configuration alone: fast, small, and no weight is read."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

_CHECK = r"""
import json, re, sys, time
import diffusers, torch, torchao.quantization, transformers
from transformers import CLIPTextModel, T5EncoderModel, UMT5EncoderModel
from diffusers import FluxPipeline, StableDiffusionXLPipeline, WanPipeline
import diffkiln.compiler.compile
started = time.perf_counter()
checked = diffkiln.compiler.compile.check(json.loads(sys.argv[1]))
print(json.dumps({
    "seconds": time.perf_counter() - started,
    "peak": 1024 * int(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1]),
    "before": checked.bytes_before, "after": checked.bytes_after,
    "notes": [ran.notes for ran in checked.report],
}))
"""


def spec(architecture, passes, target=None, **inputs):
    return {
        "spec_version": 1,
        "source": {"architecture": architecture, "seed": 0},
        "target": target or {"device": "cpu"},
        "inputs": {"height": 1024, "width": 1024, "num_inference_steps": 28, **inputs},
        "passes": passes,
    }


FUSE = {"name": "fuse_qkv", "component": "transformer"}
NF4 = {"backend": "bitsandbytes", "type": "nf4", "double_quant": True}
#: spec, component, and the billions of bytes that are left of it
SPECS = {
    "flux": (
        spec(
            "flux.1-dev",
            [
                FUSE,
                {"name": "quantize", "mapping": {"transformer": {"type": "float8_dynamic"}, "text_encoder_2": NF4}},
            ],
            {"device": "cuda", "gpu": "nvidia-rtx-4090"},
        ),
        "transformer",
        11.9,
    ),
    "sdxl": (
        spec(
            "sdxl-base-1.0",
            [
                {"name": "fuse_qkv", "component": "unet"},
                {"name": "quantize", "component": "unet", "type": "int8_weight_only"},
                {"name": "compile", "component": "unet"},
            ],
        ),
        "unet",
        3.58,
    ),
    "wan": (
        spec(
            "wan2.1-t2v-14b",
            [FUSE, {"name": "layerwise_cast", "component": "transformer"}],
            height=480,
            width=832,
            num_frames=81,
        ),
        "transformer",
        14.6,
    ),
}


@pytest.mark.parametrize("name", SPECS)
def test_check_takes_seconds_and_no_weights(name):
    given, component, gigabytes = SPECS[name]
    command = [sys.executable, "-W", "ignore", "-c", _CHECK, json.dumps(given)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.strip().splitlines()[-1])
    assert told["peak"] < 1e9
    assert told["seconds"] < 10, "benchmarks/footprint.py measures it; here other tests run beside it"
    assert told["after"][component] / 1e9 == pytest.approx(gigabytes, rel=0.01)
    assert all(told["notes"])
