"""A compiler that hangs, is killed or fails."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from diffkiln.errors import ExportError
from diffkiln.exporters import processes
from diffkiln.exporters.processes import call

#: Starts a child that sleeps, as g++ starts cc1plus, writes both ids, and waits for it.
DRIVER = """
import os, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open("ids.part", "w").write(f"{os.getpid()} {child.pid}")
os.rename("ids.part", "ids")
child.wait()
"""


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def run(code: str, folder: Path, seconds: float = 60) -> None:
    call(python(code), folder, dict(os.environ), seconds)


def gone(process: int) -> bool:
    """Whether it has ended: a zombie that nobody has waited for yet has, too."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def all_end(folder: Path) -> bool:
    ids = [int(word) for word in (folder / "ids").read_text().split()]
    assert len(ids) == 2
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        if all(gone(process) for process in ids):
            return True
        time.sleep(0.01)
    return False


def test_a_compiler_that_hangs_is_ended_with_its_children(tmp_path):
    with pytest.raises(ExportError, match=r"did not finish within 2 seconds.*smaller regions"):
        run(DRIVER, tmp_path, seconds=2)
    assert all_end(tmp_path)


def test_memory_that_runs_out_takes_the_compiler_and_what_it_started(tmp_path):
    look = "open('/proc/self/oom_score_adj').read().strip()"
    own = Path("/proc/self/oom_score_adj").read_text()
    code = f"import time, subprocess, sys; time.sleep(0.2); open('own', 'w').write({look})"
    code += "; open('inherited', 'w').write(subprocess.check_output(['cat', '/proc/self/oom_score_adj'], text=True))"
    run(code, tmp_path)
    assert (tmp_path / "own").read_text() == "1000"
    assert (tmp_path / "inherited").read_text().strip() == "1000"
    assert Path("/proc/self/oom_score_adj").read_text() == own


def test_an_interrupt_ends_the_compiler_and_its_children(tmp_path, monkeypatch):
    def interrupted(self, *_, **__):
        while not (tmp_path / "ids").exists():
            time.sleep(0.01)
        raise KeyboardInterrupt

    monkeypatch.setattr(processes.subprocess.Popen, "communicate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(DRIVER, tmp_path)
    assert all_end(tmp_path)


def test_a_compiler_killed_for_memory_is_told_with_the_peak_and_a_mend(tmp_path):
    with pytest.raises(ExportError, match=r"memory ran out: compilers have taken up to \d+\.\d+ GB.*fewer cores"):
        run("import os; os.kill(os.getpid(), 9)", tmp_path)
    told = (
        "import sys; print('g++: fatal error: Killed signal terminated program cc1plus', file=sys.stderr); sys.exit(1)"
    )
    with pytest.raises(ExportError, match="memory ran out"):
        run(told, tmp_path)


def test_a_failure_gives_the_first_errors(tmp_path):
    code = "import sys; print('note\\nx.cpp:1: error: no such thing', file=sys.stderr); sys.exit(3)"
    with pytest.raises(ExportError, match=r"status 3:\nx\.cpp:1: error: no such thing$"):
        run(code, tmp_path)
    with pytest.raises(ExportError, match="cannot be run"):
        call([str(tmp_path / "none")], tmp_path, {}, 1)
