"""One bundle for a range of sizes, all of its run compiled: each size gives what diffusers gives, by shared engines."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import diffkiln
from diffkiln.errors import CallError
from diffkiln.interpreter.quiet import quiet_libraries
from tests.end_to_end.test_families import spec_of
from tests.exporters.regions import engine_cache
from tests.passes.test_cache_schedule import draw, eager
from tests.pipelines import WARNING_FILTERS

pytestmark = [pytest.mark.filterwarnings(text) for text in WARNING_FILTERS]
SIZES = {"min": 64, "max": 96, "step": 32}
PASSES = [
    {"name": "compile", "component": "transformer"},
    {"name": "compile", "component": "vae", "scope": "whole"},
    {"name": "compile", "component": "scheduler"},
]


@pytest.fixture(scope="module")
def made(families):
    made = spec_of("flux", families) | {"passes": PASSES, "runtime": {"on_incompatible": "eager"}}
    made["inputs"] |= {"height": SIZES, "width": SIZES, "num_inference_steps": 2}
    return made


@pytest.fixture(scope="module")
def bundle(made, tmp_path_factory) -> Path:
    return diffkiln.compile(made, tmp_path_factory.mktemp("sizes") / "bundle", cache=engine_cache()).path


def at(made, height, width):
    return made | {"inputs": made["inputs"] | {"height": height, "width": width}}


def test_every_size_gives_what_diffusers_gives(made, bundle):
    pipe = eager(made)
    with diffkiln.load(bundle) as compiled:
        assert len(compiled.variants) == 4
        for height, width in ((64, 64), (64, 96), (96, 64), (96, 96)):
            wanted = draw(pipe, at(made, height, width))
            found = draw(compiled, at(made, height, width))
            assert float((found - wanted).norm() / wanted.norm()) <= 1e-4


def test_sizes_share_engines(bundle):
    with diffkiln.load(bundle) as compiled:
        rows = compiled.bundle.manifest.engines
        assert not [region for module in compiled.executor.modules.values() for region in module.regions
                    if (module.component, region) not in compiled.executor.engines
                    and module.component in ("transformer", "vae", "scheduler")]  # fmt: skip
    blocks = [row for row in rows if row.region.startswith("FluxTransformerBlock")]
    assert len({row.inputs[0].shape for row in blocks}) == len(blocks) == 3
    assert len({row.path for row in blocks}) == 1
    assert len({row.path for row in rows}) < len(rows)


def test_size_outside_is_told_what_there_is(made, bundle):
    with diffkiln.load(bundle) as compiled, pytest.raises(CallError, match=r"height=64, .*width=96"):
        draw(compiled, at(made, 128, 64))


def test_as_diffusers_runs_a_size_outside_eagerly_as_the_spec_says(made, bundle):
    with quiet_libraries():
        pipe = diffkiln.load(bundle, as_diffusers=True)
    pipe.set_progress_bar_config(disable=True)
    original = eager(made)
    for height, width in ((64, 96), (128, 64)):
        wanted = draw(original, at(made, height, width))
        assert float((draw(pipe, at(made, height, width)) - wanted).norm() / wanted.norm()) <= 1e-4
    assert torch.isfinite(wanted).all()
