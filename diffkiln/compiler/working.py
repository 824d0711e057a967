"""The working memory of a bundle for this CPU, which a process of its own measures before the bundle is published.

No two measurements give the same bytes, and the manifest that has them is the bundle's id. So what was measured once on
this machine is kept in the user's state directory, and a build that comes to the same bundle again takes it from there.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from diffkiln.bundle import open_bundle
from diffkiln.bundle.digest import sha256_bytes
from diffkiln.bundle.state import existing_state_dir, state_dir
from diffkiln.compiler.plan import Plan
from diffkiln.errors import DiffkilnError
from diffkiln.guards.printable import get_logger
from diffkiln.program.working import PLANNED_FROM
from diffkiln.runtime.compatibility import machine

log = get_logger(__name__)
_DIRECTORY = "measured"
#: After so many seconds a measurement is given up.
PATIENCE = 600


@dataclass(frozen=True)
class Measured:
    """What was measured.

    Attributes:
        rows: by target, as the manifest has them; empty if nothing was measured.
        notices: why not, where something could have been.
    """

    rows: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    notices: tuple[str, ...] = ()


def measured_here(root: Path, plan: Plan) -> Measured:
    """Measures the working memory of a complete bundle in a directory.

    Nothing is measured of bundles for GPUs or several processes, of those that run as diffusers, and of those that are
    planned without working memory.
    """
    if not _is_planned(plan):
        return Measured()
    kept = _Kept(root)
    found = kept.read() or _answer(root)
    if "reason" in found:
        return Measured(notices=(f"plans of memory use an estimate of the working memory: {found['reason']}",))
    kept.write(found)
    return Measured({found["target"]: {name: found[name] for name in ("bytes", "threads")}})


def _is_planned(plan: Plan) -> bool:
    alone = not plan.spec.parallel and not plan.recording.reason
    is_large = sum(plan.bytes_after.values()) >= PLANNED_FROM
    return alone and is_large and any(target.device == "cpu" for target in plan.targets)


def _answer(root: Path) -> Mapping[str, Any]:
    command = [sys.executable, "-m", "diffkiln.runtime.working", str(root)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=PATIENCE, check=True)
        return json.loads(done.stdout)
    except subprocess.TimeoutExpired:
        return {"reason": f"a call took longer than {PATIENCE} seconds"}
    except subprocess.CalledProcessError as error:
        return {"reason": f"the process that measures it ended with status {error.returncode}"}
    except (OSError, ValueError) as error:
        return {"reason": f"no process can measure it here: {error}"}


class _Kept:
    """The measurement of one bundle on this machine, as an earlier build made it."""

    def __init__(self, root: Path) -> None:
        with open_bundle(root) as bundle:
            facts = machine(bundle.manifest.requires, torch.device("cpu"))
            decisive = [bundle.id, torch.get_num_threads(), facts]
        self._name = sha256_bytes(json.dumps(decisive, sort_keys=True).encode())

    def read(self) -> Mapping[str, Any] | None:
        """Returns the answer of the process that measured; None if there is none that can be read."""
        try:
            directory = existing_state_dir(_DIRECTORY)
            found = json.loads((directory / self._name).read_bytes()) if directory is not None else {}
        except (OSError, ValueError, DiffkilnError):  # it is measured again
            return None
        return found if set(found) == {"target", "bytes", "threads"} else None

    def write(self, found: Mapping[str, Any]) -> None:
        """Keeps an answer. Where nothing can be written, the next build measures again."""
        try:
            directory = state_dir(_DIRECTORY)
            staged = directory / f".{secrets.token_hex(16)}"
            staged.write_text(json.dumps(found))
            os.replace(staged, directory / self._name)
        except (OSError, DiffkilnError) as error:
            log.info("the next build will measure the working memory again: %s", error)
