"""Fresh processes for the tests."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from diffkiln.interpreter.quiet import quiet_libraries
from tests.conftest import DIGITS

#: What the end-to-end tests of backends ask the example for.
PROMPT, SEED = "a handwritten seven", 7

DRAW = Path(__file__).with_name("draw.py")


def draw(job: Mapping[str, Any], environment: Mapping[str, str], python: str = sys.executable) -> dict[str, Any]:
    """What draw.py tells of one job."""
    command = [python, str(DRAW), json.dumps(job, default=str)]
    done = subprocess.run(command, env=dict(environment), capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])


def run(script: str, job: Mapping[str, Any]) -> Any:
    """What a script beside this file prints last, as JSON, in a fresh process with this one's environment."""
    command = [sys.executable, str(DRAW.with_name(script)), json.dumps(job, default=str)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])


def off_by(spec: Mapping[str, Any], found: np.ndarray) -> float:
    """How far an image is from the one that diffusers draws of PROMPT and SEED as the spec says, relative to it."""
    import torch
    from diffusers import DiffusionPipeline

    with quiet_libraries():
        pipe = DiffusionPipeline.from_pretrained(DIGITS / "model")
    pipe.set_progress_bar_config(disable=True)
    given = {key: value for key, value in spec["inputs"].items() if key not in ("batch_size", "call")}
    given |= spec["inputs"]["call"]
    wanted = pipe(PROMPT, generator=torch.Generator("cpu").manual_seed(SEED), output_type="np", **given).images
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))
