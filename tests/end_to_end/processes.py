"""Fresh processes for the tests."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
