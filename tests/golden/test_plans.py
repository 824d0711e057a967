"""Plans of a few specs, as the passes leave them without any weights, against what they were.

DIFFKILN_UPDATE_GOLDEN=1 writes the files anew; read the difference before you commit it.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from diffkiln.compiler.check import check
from diffkiln.models.weights import weights_of
from diffkiln.passes import manager
from tests.passes.adapters import adapter
from tests.passes.plans import CPU, H200, checked, ghost
from tests.pipelines import WARNING_FILTERS

pytestmark = [pytest.mark.filterwarnings(text) for text in WARNING_FILTERS]
HERE = Path(__file__).parent
EXAMPLES = HERE.parents[1] / "examples"

FUSE = {"name": "fuse_qkv", "component": "transformer"}
INT8 = {"name": "quantize", "component": "transformer", "type": "int8_weight_only", "exclude": ["*norm*"]}
COMPILE = {"name": "compile", "component": "transformer"}
SPECS = {
    "flux-int8": ("flux", [FUSE, INT8, COMPILE]),
    "sdxl-bf16": ("sdxl", [{"name": "cast", "component": "unet", "dtype": "bfloat16"}, FUSE | {"component": "unet"}]),
    "sd3-text-int8": ("sd3", [INT8 | {"component": "text_encoder_3", "exclude": []}, COMPILE]),
    "pixart": ("pixart_sigma", [FUSE, COMPILE]),
    "flux-prune": ("flux", [{"name": "prune", "component": "transformer", "blocks": ["single_transformer_blocks.0"]}]),
    "flux-layerwise": ("flux", [{"name": "layerwise_cast", "component": "transformer"}, COMPILE]),
    "flux-mixed": (
        "flux",
        [
            FUSE,
            {
                "name": "quantize",
                "mapping": {
                    "transformer": {"type": "int4_weight_only", "group_size": 32},
                    "text_encoder_2": {"backend": "bitsandbytes", "type": "nf4", "double_quant": True},
                },
            },
            COMPILE,
        ],
    ),
    "sdxl-layout": (
        "sdxl",
        [{"name": "merge_tokens", "component": "unet"}, {"name": "channels_last", "component": "unet"}],
    ),
}
ON_GPUS = {
    "sdxl-attention": (
        "sdxl",
        [
            {"name": "cast", "component": "unet", "dtype": "bfloat16"},
            {
                "name": "attention_backend",
                "mapping": {"unet": {"backend": "_native_cudnn"}, "text_encoder": {"backend": "native_efficient"}},
            },
            {"name": "channels_last", "component": "unet"},
        ],
    ),
    "flux-sparse": ("flux", [FUSE, {"name": "sparsify", "component": "transformer", "exclude": ["*norm*"]}]),
    "flux-float8": ("flux", [FUSE, INT8 | {"type": "float8_dynamic", "granularity": "per_tensor"}]),
}


def _described(module) -> dict:
    """Bytes, and the weights by what became of them: a digest stands for the names, which are many."""
    rows = [f"{name} {tuple(t.shape)} {t.dtype}".replace("torch.", "") for name, t in weights_of(module)]
    types: dict[str, int] = {}
    for _, tensor in weights_of(module):
        types[str(tensor.dtype).removeprefix("torch.")] = types.get(str(tensor.dtype).removeprefix("torch."), 0) + 1
    return {
        "class": type(module).__name__,
        "bytes": sum(tensor.numel() * tensor.itemsize for _, tensor in weights_of(module)),
        "tensors": types,
        "first": rows[:3],
        "digest": hashlib.sha256("\n".join(sorted(rows)).encode()).hexdigest()[:16],
    }


@pytest.mark.parametrize("name", [*SPECS, *ON_GPUS])
def test_plan_is_as_it_was(name):
    family, passes = (SPECS | ON_GPUS)[name]
    plan = ghost(family)
    _compare(name, *manager.run(plan, checked(plan, *passes, target=H200 if name in ON_GPUS else CPU)))


def test_plan_with_an_adapter_is_as_it_was(tmp_path):
    """The file's digest is part of the plan, its path is not."""
    plan = ghost("sdxl")
    file = adapter(tmp_path / "adapter.safetensors", plan.modules["unet"], "unet", ending="attn2.to_k")
    entry = {"name": "fuse_lora", "component": "unet", "adapters": [{"file": str(file), "scale": 0.5}]}
    _compare("sdxl-lora", *manager.run(plan, checked(plan, entry, FUSE | {"component": "unet"})))


@pytest.mark.parametrize(("name", "spec"), [("digits", "spec.json"), ("digits-int8", "spec-int8.json")])
def test_plan_of_an_example_is_as_it_was(name, spec):
    found = check(EXAMPLES / "digits" / spec)
    _compare(name, found.state, found.report)


def _compare(name, plan, report):
    told = {
        "passes": [
            {
                "name": ran.listed.step.name,
                "options": ran.listed.step.options(),
                "changed": ran.changed,
                "notes": list(ran.notes),
            }
            for ran in report
        ],
        "facts": sorted(map(str, plan.facts)),
        "compile": [[request.component, request.backend] for request in plan.compile],
        "components": {component: _described(module) for component, module in plan.modules.items()},
    }
    text = json.dumps(told, indent=2) + "\n"
    file = HERE / f"{name}.json"
    if os.environ.get("DIFFKILN_UPDATE_GOLDEN"):
        file.write_text(text)
    assert text == file.read_text()
