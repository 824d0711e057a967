"""What an engine of TensorRT says of itself, and whether this machine is the one that it is for.

TensorRT looks at an engine's version and size, too, but says little of what it found, and wants a driver for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Annotated, ClassVar

import torch
from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from diffkiln.bundle.tensorrt import ENGINE, FACTS, LIBRARIES, Library
from diffkiln.errors import Incompatible, Incomplete, ManifestInvalid, MissingDependency, Problem
from diffkiln.runtime.accelerator import capability

_LARGEST = 2**20
_Text = Annotated[str, StringConstraints(max_length=256)]
_Count = Annotated[int, Field(ge=0, lt=2**53)]


@dataclass(frozen=True)
class Facts:
    """The facts of an engine.

    Attributes:
        library, version: what built it, and what alone runs it.
        sm: the compute capability of its GPU, such as "sm_89".
        nbytes: of its file.
        inputs, outputs: names by position; None for an input that the engine does not take.
        weight_budget: bytes of its own weights that stay on the GPU; None for all.
        holds_weights: whether it has weights of its own.
    """

    library: Library
    version: str
    sm: str
    nbytes: int
    inputs: tuple[str | None, ...]
    outputs: tuple[str, ...]
    weight_budget: int | None
    holds_weights: bool


def read_facts(directory: Path) -> Facts:
    """Returns the facts of the engine in a directory, and checks that its file is whole.

    Raises:
        Incomplete: a file is missing or cut short.
        ManifestInvalid: the facts are none.
        Incompatible: they name a library that this diffkiln does not know.
    """
    for name in (FACTS, ENGINE):
        if not (directory / name).is_file():
            raise Incomplete(f"{directory}: the file {name} is missing")
    facts = _facts(directory / FACTS)
    found = (directory / ENGINE).stat().st_size
    if found != facts.nbytes:
        raise Incomplete(f"{directory / ENGINE}: found {found} bytes, required {facts.nbytes}: the engine is cut short")
    return facts


def _facts(path: Path) -> Facts:
    try:
        if path.stat().st_size > _LARGEST:
            raise ValueError(f"it has more than {_LARGEST} bytes")
        read = _Facts.model_validate_json(path.read_bytes())
    except (ValueError, RecursionError) as error:
        first = str(error).partition("\n")[0]
        raise ManifestInvalid(f"{path}: it does not describe the engine: {first}") from None
    if read.library not in LIBRARIES:
        known = ", ".join(LIBRARIES)
        raise Incompatible(f"library: found {read.library!r}, this diffkiln runs {known}. Install a later diffkiln")
    return Facts(
        LIBRARIES[read.library],
        read.version,
        read.sm,
        read.bytes,
        read.inputs,
        read.outputs,
        read.weight_budget,
        read.holds_weights,
    )


class _Facts(BaseModel):
    """The facts as they stand in the file."""

    model_config: ClassVar[ConfigDict] = ConfigDict(strict=True, extra="ignore")

    library: _Text
    version: _Text
    sm: _Text
    bytes: _Count
    inputs: tuple[_Text | None, ...]
    outputs: tuple[_Text, ...]
    weight_budget: _Count | None
    holds_weights: bool


def check_machine(directory: Path, facts: Facts, device: torch.device) -> None:
    """Compares library and GPU with those that the engine was built for.

    Raises:
        Incompatible: all differences together; MissingDependency where the library is all that is missing.
    """
    problems = []
    library = facts.library
    exact = f"pip install {library.package}=={facts.version}"
    try:
        found = str(import_module(library.module).__version__)
    except ImportError:
        found = None
        problems.append(Problem(library.package, f"found nothing, required {facts.version}", exact))
    if found is not None and found != facts.version:
        hint = f"An engine runs with the version that built it alone: {exact}, or compile again"
        problems.append(Problem(library.package, f"found {found}, required {facts.version}", hint))
    here = _gpu(device)
    if here != facts.sm:
        problems.append(Problem("gpu", f"found {here}, required {facts.sm}", "Compile for this GPU's target"))
    if problems:
        kind = MissingDependency if found is None and here == facts.sm else Incompatible
        reasons = "\n".join(map(str, problems))
        raise kind(f"{directory}: this machine does not fit the engine:\n{reasons}", problems=problems)


def _gpu(device: torch.device) -> str:
    found = capability(device) if device.type == "cuda" else None
    return f"sm_{found[0]}{found[1]}" if found else f"no CUDA GPU ({device})"
