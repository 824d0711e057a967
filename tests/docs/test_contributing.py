"""What CONTRIBUTING says is enough to add a pass, a backend or a family: followed in a copy of the package."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import diffkiln

PACKAGE = Path(diffkiln.__file__).parent
TEXT = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text()


def section(title: str) -> str:
    return TEXT.partition(f"## {title}\n")[2].partition("\n## ")[0]


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return shutil.copytree(PACKAGE, tmp_path / "diffkiln", ignore=shutil.ignore_patterns("__pycache__"))


def run(copy: Path, *arguments: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(copy.parent), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, env=environment, cwd=copy.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_pass_is_one_file(copy: Path) -> None:
    example = re.search(r"Copy `diffkiln/(\S+\.py)`", section("Add a pass"))
    assert example
    source = (copy / example[1]).read_text()
    name = re.search(r'name: ClassVar\[str\] = "(\w+)"', source)
    assert name
    (copy / example[1]).with_name("mine.py").write_text(source.replace(f'"{name[1]}"', '"mine"'))
    assert run(copy, "-m", "diffkiln", "passes", "mine").startswith("mine: ")
    assert '"mine"' in run(copy, "-m", "diffkiln", "schema")


def test_a_backend_is_two_places(copy: Path) -> None:
    assert "`onnx` is the shortest example" in section("Add a backend")
    for room in ("exporters", "runtime/engines"):
        mine = shutil.copytree(copy / room / "onnx", copy / room / "mine")
        for file in mine.rglob("*.py"):
            text = re.sub(r"(exporters|engines)\.onnx\b", r"\1.mine", file.read_text())
            file.write_text(text.replace('name: ClassVar[str] = "onnx"', 'name: ClassVar[str] = "mine"'))
    told = run(copy, "-m", "diffkiln", "passes", "compile")
    assert re.search(r"One of aot_inductor, (mine, )?onnx, (mine, )?", " ".join(told.split()))
    code = (
        "from diffkiln import plugins; print(plugins.load('exporters', 'mine').name, plugins.load('engines', 'mine'))"
    )
    assert run(copy, "-c", code).startswith("mine <class 'diffkiln.runtime.engines.mine.")


def test_a_family_is_one_file(copy: Path) -> None:
    named = re.search(r"`(\w+)\.py`\s+is the shortest with patches", section("Add a family"))
    assert named
    shutil.copy(copy / "families" / f"{named[1]}.py", copy / "families" / "mine.py")
    code = "from diffkiln import plugins; print(len(plugins.load('families', 'mine').patches))"
    assert int(run(copy, "-c", code)) > 0
