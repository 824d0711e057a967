"""A model compiled for this CPU, kept from one load to the next.

What OpenVINO compiles is for one CPU and one version, while a bundle is the same bytes for ever. So it lies with the
user's own state, in a directory that nobody else may write to, under a digest of all that decides it. It is the graph
as OpenVINO rewrote it, and refers to the engine's file of weights, which it does not repeat. OpenVINO parses it without
distrust, as dangerous as loading code: so it is taken from nobody else, and only as it was written.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from diffkiln.bundle import Requires
from diffkiln.bundle.digest import sha256_bytes
from diffkiln.bundle.notes import read_note, write_note
from diffkiln.bundle.openvino import COMPACT, MODEL, PACKAGE, Facts, kept_beside
from diffkiln.errors import Incompatible
from diffkiln.guards.printable import get_logger
from diffkiln.runtime.compatibility import machine

log = get_logger(__name__)

_KIND = "kernels"
_DIGEST = 64


def compiled_model(core: Any, directory: Path, facts: Facts) -> Any:
    """Returns the engine's model, compiled: what an earlier load kept, or compiled now and kept.

    Raises:
        Incompatible: OpenVINO cannot compile it here.
    """
    settings = facts.settings(torch.get_num_threads())
    name = f"{_key(core, facts, settings)}.cache"
    found = _kept(core, name, settings | kept_beside(directory))
    if found is not None:
        return found
    started = time.perf_counter()
    try:
        made = core.compile_model(directory / MODEL, "CPU", {**settings, **COMPACT})
    except RuntimeError as error:
        last = str(error).strip().splitlines()[-1][:300]
        raise Incompatible(f"{directory}: OpenVINO {facts.version} cannot compile the engine here: {last}") from error
    seconds = time.perf_counter() - started
    log.info("the engine %s was compiled for this CPU in %.1f s; later loads need less", directory.name, seconds)
    data = made.export_model().getvalue()
    write_note(_KIND, name, sha256_bytes(data).encode() + data)
    return made


def _key(core: Any, facts: Facts, settings: Mapping[str, str | int]) -> str:
    here = machine(Requires(python="", torch="", packages={PACKAGE: ""}), torch.device("cpu"))
    device = str(core.get_property("CPU", "FULL_DEVICE_NAME"))
    return sha256_bytes(json.dumps([facts.digest, dict(settings), here, device], sort_keys=True).encode())


def _kept(core: Any, name: str, settings: Mapping[str, str | int]) -> Any:
    """Returns what an earlier load compiled; None if there is none, or it is damaged."""
    data = read_note(_KIND, name)
    if data is None or sha256_bytes(data[_DIGEST:]).encode() != data[:_DIGEST]:
        return None
    try:
        return core.import_model(data[_DIGEST:], "CPU", settings)
    except RuntimeError as error:
        log.warning("an engine is compiled again, since OpenVINO refuses what it compiled before: %s", error)
        return None
