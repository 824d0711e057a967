"""A compiled bundle on a machine that serves: a fresh process, no compiler, no diffusers."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

import diffkiln
from tests.conftest import DIGITS, environment_of_production
from tests.end_to_end.processes import draw
from tests.exporters.regions import engine_cache

REQUESTS = [("a handwritten seven", 7), ("a handwritten zero", 21), ("the digit 4", 3)]


@pytest.fixture(scope="module")
def judge():
    """The example's modules, which import each other by name."""
    sys.path.insert(0, str(DIGITS))
    import classifier
    import evaluate_eager

    yield classifier, evaluate_eager
    sys.path.remove(str(DIGITS))


@pytest.fixture(scope="module")
def eager(judge):
    """What diffusers draws for REQUESTS, as arrays from 0 to 1."""
    import torch

    pipe = judge[1].load()
    images = [
        pipe(prompt, generator=torch.Generator("cpu").manual_seed(seed), output_type="np", **judge[1].CALL).images
        for prompt, seed in REQUESTS
    ]
    return np.concatenate(images)


@pytest.fixture(scope="module")
def serving(tmp_path_factory):
    """The environment that `drawn` was drawn in."""
    return environment_of_production(tmp_path_factory.mktemp("serving"))


@pytest.fixture(scope="module")
def drawn(digits_bundle, serving, tmp_path_factory):
    out = tmp_path_factory.mktemp("drawn") / "images.npy"
    told = draw({"bundle": digits_bundle, "requests": REQUESTS, "out": out}, serving)
    return told, np.load(out)


def test_images_equal_eager_within_two_of_255(drawn, eager):
    _, images = drawn
    assert np.abs(images - eager).max() <= 2 / 255


def test_nothing_is_compiled_and_no_process_starts(drawn, serving):
    told, _ = drawn
    assert told["processes"] == []
    assert not told["inductor"]
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "XDG_CACHE_HOME"):
        assert list(Path(serving[name]).rglob("*")) == []


def test_neither_diffusers_nor_transformers_is_imported(drawn):
    told, _ = drawn
    foreign = {"diffusers", "transformers", "accelerate", "torchao", "huggingface_hub", "triton", "scipy", "sklearn"}
    assert foreign.isdisjoint(told["modules"])


def test_engines_run_every_block(drawn):
    told, _ = drawn
    assert told["engine_calls"] >= 4 * 8 * len(REQUESTS)


def test_weights_in_memory_stay_within_the_groups_that_the_policy_allows(drawn):
    """A component's rest, the block in use, and the next one, which is on its way."""
    told, _ = drawn
    store = told["store"]
    assert store["groups_peak"] <= 3 < store["groups"]
    assert store["bytes_peak"] <= 3 * store["largest"] < store["total"] * 3
    assert store["bytes_now"] == 0


def test_a_moved_bundle_draws_the_same(digits_bundle, production, tmp_path, drawn):
    moved = shutil.copytree(digits_bundle, tmp_path / "elsewhere" / "renamed")
    out = tmp_path / "moved.npy"
    draw({"bundle": moved, "requests": REQUESTS, "out": out}, production)
    np.testing.assert_array_equal(np.load(out), drawn[1])


def test_memory_does_not_grow_over_a_hundred_calls(digits_bundle, production):
    told = draw({"bundle": digits_bundle, "requests": REQUESTS, "repeat": 100}, production)
    early, late = max(told["memory"][10:30]), max(told["memory"][-20:])
    assert late - early < 2_000_000


@pytest.mark.parametrize(
    ("kind", "digits"),
    [
        ("int8_weight_only", 100),
        pytest.param("int8_dynamic", 40, marks=pytest.mark.more),
        pytest.param("float8_weight_only", 40, marks=pytest.mark.more),
    ],
)
def test_quantized_digits_are_recognised_as_well_as_eager(
    kind, digits, digits_int8_bundle, production, tmp_path, judge
):
    """The eager score of the hundred digits is 1.00 (tests/examples/test_digits.py); benchmarks/quantization.py draws
    all of them with every type."""
    classifier, _ = judge
    bundle = digits_int8_bundle
    if kind != "int8_weight_only":
        spec = json.loads((DIGITS / "spec-int8.json").read_text())
        spec["passes"][1]["type"] = kind
        bundle = diffkiln.compile(spec, tmp_path / "bundle", base=DIGITS, cache=engine_cache()).path
    wanted = classifier.requests(digits)
    out = tmp_path / "images.npy"
    told = draw({"bundle": bundle, "requests": [[r.prompt, r.seed] for r in wanted], "out": out}, production)
    assert classifier.score(np.load(out), [r.digit for r in wanted]) >= 0.98
    assert "torchao" not in told["modules"]
