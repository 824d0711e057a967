"""What an engine of OpenVINO says of itself, and whether this machine is one that may run it."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import torch

from diffkiln.bundle.openvino import FACTS, MODEL, PACKAGE, WEIGHTS, Facts
from diffkiln.errors import Incompatible, Incomplete, ManifestInvalid, MissingDependency, Problem

_LARGEST = 2**20


def read_facts(directory: Path) -> Facts:
    """Returns the facts of the engine in a directory, and checks that its files are whole.

    Raises:
        Incomplete: a file is missing or cut short.
        ManifestInvalid: the facts are none.
    """
    for name in (FACTS, MODEL, WEIGHTS):
        if not (directory / name).is_file():
            raise Incomplete(f"{directory}: the file {name} is missing")
    facts = _parsed(directory / FACTS)
    for name, required in zip((MODEL, WEIGHTS), facts.sizes, strict=True):
        found = (directory / name).stat().st_size
        if found != required:
            raise Incomplete(f"{directory / name}: found {found} bytes, required {required}: it is cut short")
    return facts


def _parsed(path: Path) -> Facts:
    try:
        if path.stat().st_size > _LARGEST:
            raise ValueError(f"it has more than {_LARGEST} bytes")
        return Facts.model_validate_json(path.read_bytes())
    except (ValueError, RecursionError) as error:
        first = str(error).partition("\n")[0]
        raise ManifestInvalid(f"{path}: it does not describe the engine: {first}") from None


def check_machine(directory: Path, facts: Facts, device: torch.device) -> None:
    """Compares device and version with those that the engine was made for, before OpenVINO is imported.

    Raises:
        Incompatible: the device is no CPU, or the version is another.
        MissingDependency: OpenVINO is not installed.
    """
    if device.type != "cpu":
        raise Incompatible(f"{directory}: device: found {device}, required a CPU, where OpenVINO's engines run")
    exact = f"pip install {PACKAGE}=={facts.version}"
    try:
        found = metadata.version(PACKAGE)
    except metadata.PackageNotFoundError:
        problem = Problem(PACKAGE, f"found nothing, required {facts.version}", exact)
        raise MissingDependency(f"{directory} is run by OpenVINO: {problem}", problems=[problem]) from None
    if found != facts.version:
        hint = f"An engine runs with the version that made it alone: {exact}, or compile again"
        problem = Problem(PACKAGE, f"found {found}, required {facts.version}", hint)
        raise Incompatible(f"{directory}: this machine does not fit the engine: {problem}", problems=[problem])
