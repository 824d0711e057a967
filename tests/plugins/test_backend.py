"""A backend of another distribution: compiled with, loaded where it is installed, and refused where it is not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import diffkiln
from diffkiln.cli import main
from diffkiln.errors import MissingDependency, SpecError
from diffkiln.passes.registry import option_models
from tests.conftest import DIGITS
from tests.end_to_end.processes import PROMPT, SEED, draw, off_by
from tests.exporters.regions import engine_cache
from tests.passes.plans import placed

COMPILE = {"name": "compile", "component": "transformer", "backend": "replay"}


@pytest.fixture(scope="module")
def spec() -> dict[str, Any]:
    made = json.loads((DIGITS / "spec.json").read_text())
    return made | {"passes": [COMPILE | {"paranoid": True}]}


@pytest.fixture(scope="module")
def bundle(backend: Path, spec: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return diffkiln.compile(spec, tmp_path_factory.mktemp("replay") / "bundle", base=DIGITS, cache=engine_cache()).path


def path_with(*folders: Path | str) -> dict[str, str]:
    own = [os.environ["PYTHONPATH"]] if "PYTHONPATH" in os.environ else []
    return {"PYTHONPATH": os.pathsep.join(map(str, (*folders, *own)))}


def test_bundle_names_the_distribution(bundle: Path) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert manifest["requires"]["packages"] == {"diffkiln-replay": ">=0.1.0"}
    assert {(row["backend"], row["options"]["paranoid"]) for row in manifest["engines"]} == {("replay", True)}
    (row,) = manifest["passes"]
    assert row["options"]["paranoid"] is True
    assert "flags" not in row["options"]


def test_process_that_has_it_draws_what_diffusers_draws(
    backend: Path, bundle: Path, spec: dict[str, Any], production: dict[str, str], tmp_path: Path
) -> None:
    job = {"bundle": bundle, "requests": [[PROMPT, SEED]], "out": tmp_path / "found.npy"}
    told = draw(job, production | path_with(backend))
    assert "diffkiln_replay" in told["modules"]
    assert {"diffusers", "transformers"}.isdisjoint(told["modules"])
    assert told["engine_calls"] == 0  # of AOTInductor's and ONNX Runtime's
    assert off_by(spec, np.load(tmp_path / "found.npy")) <= 1e-4


def test_process_that_has_it_not_says_what_to_install(bundle: Path, production: dict[str, str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "diffkiln", "run", str(bundle), "--prompt", PROMPT, "-o", str(tmp_path / "x.png")]
    done = subprocess.run(command, env=production | path_with(), capture_output=True, text=True, check=False)
    assert done.returncode == MissingDependency.exit_code
    assert "diffkiln-replay: found nothing, required >=0.1.0. pip install diffkiln-replay" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.usefixtures("backend")
class TestWhereItIsInstalled:
    def test_its_options_are_fields_of_compile(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert "paranoid" in option_models()["compile"].model_fields
        assert main(["passes", "compile"]) == 0
        told = " ".join(capsys.readouterr().out.split())
        assert "One of aot_inductor, onnx, openvino, tensorrt, torch_compile, replay, auto." in told
        assert main(["schema"]) == 0
        assert '"paranoid"' in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("options", "told"),
        [
            ({"paranoid": 1}, r"\.paranoid: must be true or false"),
            ({"paranoiac": True}, r'\.paranoiac: there is no such field\. Did you mean "paranoid"\?'),
            ({"backend": "replya"}, r'\.backend: "replya" is not one of .*"replay", "auto"\. Did you mean "replay"\?'),
            (
                {"backend": "aot_inductor", "paranoid": True},
                r'\.paranoid: the backend aot_inductor has no such option\. Remove it, or choose "backend": "replay"',
            ),
            ({"weights": "engine"}, r'\.weights: the backend replay has no such option\. .* "openvino"'),
        ],
    )
    def test_wrong_options_are_refused_by_path(self, options: dict[str, Any], told: str) -> None:
        with pytest.raises(SpecError, match=r"\$\.passes\[0\]" + told):
            placed(COMPILE | options)
