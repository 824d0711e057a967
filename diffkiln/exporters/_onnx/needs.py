"""The packages that write ONNX."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import metadata
from importlib.util import find_spec

import torch

from diffkiln.errors import MissingDependency, Problem

#: As modules and as distributions.
EXPORTING = ("onnx", "onnxscript")


def missing_modules(*names: str) -> Iterator[Problem]:
    """Yields a problem where modules that exporting and trying need are not installed."""
    if missing := [name for name in names if find_spec(name) is None]:
        reason = f"{', '.join(missing)}: not installed, and needed to export to ONNX and to try the engines"
        yield Problem("", reason, "pip install 'diffkiln[onnx]'")


def exporting_tools() -> dict[str, str]:
    """Returns the versions of the tools that decide a model's bytes.

    Raises:
        MissingDependency: names the package and what installs it.
    """
    try:
        return {"torch": torch.__version__} | {name: metadata.version(name) for name in (*EXPORTING, "onnx-ir")}
    except metadata.PackageNotFoundError as error:
        raise MissingDependency(f"exporting to ONNX needs {error.name}: pip install 'diffkiln[onnx]'") from None
