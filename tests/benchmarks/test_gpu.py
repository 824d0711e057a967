"""The benchmarks for a GPU as far as none is needed: parts name ways that there are, and what is missing is said."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib import util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

GPU = Path(__file__).parents[2] / "benchmarks" / "gpu"


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(GPU.parent))

    def load(name: str) -> ModuleType:
        spec = util.spec_from_file_location(f"gpu_{name}", GPU / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        made = util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, made)
        spec.loader.exec_module(made)
        return made

    return load


def test_every_way_has_a_part_and_a_row(module) -> None:
    ways, tables = module("ways").WAYS, module("tables").WAYS
    assert list(ways) == list(tables)
    script = (GPU / "run.sh").read_text().replace("offload-$way", "offload-group offload-model offload-sequential")
    assert all(re.search(rf"rounds [^;\n]*\b{way}(?![\w-])", script) for way in ways)


def test_help_lists_the_parts_and_an_unknown_part_is_refused() -> None:
    told = subprocess.run([GPU / "run.sh", "--help"], capture_output=True, text=True, check=True).stdout
    script = (GPU / "run.sh").read_text()
    parts = re.search(r"^all=\((.*?)\)", script, re.MULTILINE | re.DOTALL)
    assert parts is not None
    assert re.search(r"parts: (.*?)\n\n", told, re.DOTALL)[1].split() == parts[1].split()  # type: ignore[index]
    assert re.findall(r"^    ([\w-]+)\) ", script, re.MULTILINE) == parts[1].split()
    assert subprocess.run([GPU / "run.sh", "nonsense"], capture_output=True).returncode == 2


class Options:
    """What `rounds.py` is told."""

    def __init__(self, rows: Path) -> None:
        self.rows, self.work, self.rehearse = rows, rows, True


@pytest.fixture
def way(module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Starts a way whose process is a script of the test's own, in the place of `ways.py`."""
    rounds = module("rounds")
    monkeypatch.setattr(rounds, "HERE", tmp_path)

    def start(script: str, seconds: float = 20) -> Any:
        (tmp_path / "ways.py").write_text(script)
        return rounds.Way("eager", Options(tmp_path), rounds.time.monotonic() + seconds)

    start.failed = rounds.Failed  # type: ignore[attr-defined]
    return start


def test_every_bundle_is_compiled_by_a_part_of_its_own(module) -> None:
    script = (GPU / "run.sh").read_text()
    named = {f"bundle-{name}" for name in re.findall(r"built ([\w-]+) ;;", script)}
    assert named == module("ways").BUILT.keys() <= module("ways").WAYS.keys()


def test_rounds_time_each_way_in_turn(module, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rounds = module("rounds")
    answers = '{"ready": true, "seconds": 0.5, "saved": ""}'
    (tmp_path / "ways.py").write_text(
        f"import sys\nprint({answers!r}, flush=True)\nfor _ in sys.stdin: print({answers!r}, flush=True)"
    )
    monkeypatch.setattr(rounds, "HERE", tmp_path)
    monkeypatch.setattr(
        sys, "argv", ["rounds.py", "eager", "bundle-fp8", "--rows", str(tmp_path), "--runs", "2", "--warm", "1"]
    )
    rounds.main()
    for name in ("eager", "bundle-fp8"):
        assert json.loads((tmp_path / f"{name}.json").read_text())["seconds"] == [0.5, 0.5]


def test_a_way_that_does_not_get_ready_is_ended(way, tmp_path: Path) -> None:
    script = "import os, time\nopen(os.path.dirname(__file__) + '/pid', 'w').write(str(os.getpid()))\ntime.sleep(60)"
    with pytest.raises(way.failed, match="the time ran out"):
        way(script, seconds=2)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_what_is_no_answer_costs_one_row(way) -> None:
    with pytest.raises(way.failed, match="no answer but b'Loading extension module"):
        way("print('Loading extension module')")


def test_answers_are_apart_from_what_libraries_print(module) -> None:
    script = (
        f"import sys; sys.path.insert(0, {str(GPU)!r}); import os, answers; answers = answers.own_output(); "
        "print('python'); os.system('echo child'); os.write(1, b'C'); print('{}', file=answers, flush=True)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "{}\n"
    assert "child" in done.stderr


def test_a_row_that_was_cut_short_is_a_row_that_is_missing(module, tmp_path: Path) -> None:
    (tmp_path / "eager.json").write_text('{"way": "eager", "seco')
    assert "| diffusers, eager | not measured |" in "\n".join(module("tables").lines(tmp_path, ""))


def test_rows_that_are_missing_or_failed_are_said_to_be(module, tmp_path: Path) -> None:
    tables = module("tables")
    rows = [
        {"way": "eager", "seconds": [2.0, 2.0], "loaded": 30.0, "first_image": 33.0},
        {"way": "compile-full", "seconds": [], "failed": "out of memory"},
        {"way": "bundle-bf16", "seconds": [1.0], "memory": {"predicted": 3.3e10, "allocated": 3.4e10}},
    ]
    for row in rows:
        (tmp_path / f"{row['way']}.json").write_text(json.dumps(row))
    text = "\n".join(tables.lines(tmp_path, ""))
    assert "| diffusers, eager | 2.000 | 2–2 (2) | 1.00 | 30 | 33 |" in text
    assert "| torch.compile, full | failed: out of memory |" in text
    assert "| bundle, bf16 | 1.000 | 1–1 (1) | 0.50 |  |  | 33.00 | 34.00 |" in text
    assert "| diffusers, sequential offload | not measured |" in text
