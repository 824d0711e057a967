"""Backends by name: what is said of one is known without what builds it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from diffkiln.errors import ExportError
from diffkiln.exporters.aot_inductor.check import AotInductor
from diffkiln.exporters.base import exporter


def test_gives_the_exporter_of_a_name() -> None:
    assert isinstance(exporter("aot_inductor"), AotInductor)


@pytest.mark.parametrize(("name", "told"), [("aot-inductor", 'Did you mean "aot_inductor"'), ("x", "There are aot_")])
def test_says_which_backends_there_are(name: str, told: str) -> None:
    with pytest.raises(ExportError, match=f"there is no backend '{name}'. {told}"):
        exporter(name)


LATE = """
import sys
from diffkiln.exporters.base import exporter
from diffkiln.plugins import plugins
for name in plugins("exporters"):
    exporter(name)
tools = {"onnx", "onnxscript", "tensorrt_rtx", "triton", "torch._inductor"}
print([name for name in sys.modules if name in tools or name.startswith("diffkiln") and name.endswith(".build")])
"""


def test_nothing_that_builds_is_imported_before_something_is_built() -> None:
    done = subprocess.run([sys.executable, "-c", LATE], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
