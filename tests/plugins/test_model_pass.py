"""A pass of another distribution: found by its entry point, ordered by what it says, run as the built-in ones."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import diffkiln
from diffkiln.cli import main
from diffkiln.errors import IllegalPlan, MissingDependency, SpecError
from diffkiln.passes.registry import pass_classes
from tests.conftest import DIGITS
from tests.passes.plans import placed
from tests.plugins.conftest import found_here

ROUND = {"name": "round", "component": "transformer", "bits": 6}
FUSE = {"name": "fuse_qkv", "component": "transformer"}


@pytest.fixture
def installed(model_pass_distribution: Path) -> Iterator[None]:
    with found_here(model_pass_distribution):
        yield


@pytest.fixture(scope="module")
def bundle(model_pass_distribution: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec: dict[str, Any] = json.loads((DIGITS / "spec.json").read_text())
    with found_here(model_pass_distribution):
        output = tmp_path_factory.mktemp("round") / "bundle"
        return diffkiln.compile(spec | {"passes": [FUSE, ROUND]}, output, base=DIGITS).path


@pytest.mark.usefixtures("installed")
def test_stands_where_it_says_with_its_reasons() -> None:
    order = list(pass_classes())
    assert order.index("fuse_qkv") < order.index("round") < order.index("quantize")
    spec = json.loads((DIGITS / "spec.json").read_text()) | {"passes": [ROUND, FUSE]}
    with pytest.raises(IllegalPlan, match=r"fuse_qkv must come before round .*rounded once they are one"):
        diffkiln.check(spec, base=DIGITS)


@pytest.mark.usefixtures("installed")
def test_its_options_are_checked_and_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SpecError, match=r"\$\.passes\[0\]\.bits: must be at most 16"):
        placed(ROUND | {"bits": 17})
    assert main(["passes", "round"]) == 0
    assert "Binary digits after the point." in capsys.readouterr().out


def test_changes_the_weights_of_a_bundle(bundle: Path) -> None:
    (row,) = [row for row in json.loads((bundle / "manifest.json").read_text())["passes"] if row["name"] == "round"]
    assert row["options"] == {"component": "transformer", "bits": 6}
    weights = {k: t for file in (bundle / "weights" / "transformer").iterdir() for k, t in load_file(file).items()}
    weight = next(t for name, t in weights.items() if name.endswith("to_qkv.weight"))
    assert torch.equal(weight * 64, torch.round(weight * 64))


def test_the_bundle_runs_without_the_distribution_and_diffusers_names_what_is_missing(bundle: Path) -> None:
    with diffkiln.load(bundle) as pipe:
        images = pipe("seven", generator=torch.Generator().manual_seed(1), output_type="pt").images
    assert images.isfinite().all()
    with pytest.raises(MissingDependency, match="made with the pass 'round', and no installed package brings it"):
        diffkiln.load(bundle, as_diffusers=True)
