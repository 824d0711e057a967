"""The working memory of a bundle for this CPU, which a process of its own measures before the bundle is published.

No two measurements give the same bytes, so what was measured lies beside the manifest, in `build.json`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffkiln.compiler.plan import Plan
from diffkiln.compiler.stages import Stages
from diffkiln.program.working import PLANNED_FROM

#: After so many seconds a measurement is given up.
PATIENCE = 600


@dataclass(frozen=True)
class Measured:
    """What was measured.

    Attributes:
        rows: by target, as `build.json` has them; empty if nothing was measured.
        notices: why not, where something could have been.
    """

    rows: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    notices: tuple[str, ...] = ()


def measured_here(root: Path, plan: Plan, stages: Stages) -> Measured:
    """Measures the working memory of a complete bundle in a directory.

    Nothing is measured of bundles for GPUs or several processes, of those that run as diffusers, and of those that are
    planned without working memory.
    """
    if not _is_planned(plan):
        return Measured()
    with stages("measure the working memory"):
        found = _answer(root)
    if "reason" in found:
        return Measured(notices=(f"plans of memory use an estimate of the working memory: {found['reason']}",))
    return Measured({found["target"]: {name: found[name] for name in ("bytes", "threads")}})


def _is_planned(plan: Plan) -> bool:
    alone = not plan.spec.parallel and not plan.recording.reason
    is_large = sum(plan.bytes_after.values()) >= PLANNED_FROM
    return alone and is_large and any(target.device == "cpu" for target in plan.targets)


def _answer(root: Path) -> Mapping[str, Any]:
    command = [sys.executable, "-P", "-m", "diffkiln.runtime.working", str(root)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=PATIENCE, check=True)
        return json.loads(done.stdout)
    except subprocess.TimeoutExpired:
        return {"reason": f"a call took longer than {PATIENCE} seconds"}
    except subprocess.CalledProcessError as error:
        return {"reason": f"the process that measures it ended with status {error.returncode}"}
    except (OSError, ValueError) as error:
        return {"reason": f"no process can measure it here: {error}"}
