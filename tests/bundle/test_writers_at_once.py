"""Locks, interrupts and kills: two writers, and writers that die."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from diffkiln.bundle import BundleWriter, open_bundle, staging
from diffkiln.errors import IntegrityError, OutputBusy, PathEscape
from tests.bundle.making import fill, left_beside, make, manifest_of


def test_of_two_writers_one_wins(output: Path) -> None:
    with BundleWriter(output) as first:
        fill(first)
        with pytest.raises(OutputBusy, match="bundle is being written"), BundleWriter(output):
            pytest.fail("entered")
        with BundleWriter(output.parent / "other"):
            pass
        # by another name, the same directory
        (output.parent / "link").symlink_to(output.parent)
        with pytest.raises(OutputBusy), BundleWriter(output.parent / "link" / output.name):
            pytest.fail("entered")
        first.publish(manifest_of)
    assert open_bundle(output).verify().id


def test_of_many_threads_one_wins(output: Path) -> None:
    results: list[object] = []
    inside = threading.Barrier(4, timeout=10)

    def write() -> None:
        try:
            with BundleWriter(output):
                inside.wait()
                results.append("wrote")
        except OutputBusy:
            inside.wait()
            results.append("busy")

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(map(str, results)) == ["busy", "busy", "busy", "wrote"]


def test_a_lock_that_is_a_link_is_refused(output: Path, state_home: Path, tmp_path: Path) -> None:
    with BundleWriter(output):
        pass
    (lock,) = (state_home / "diffkiln" / "locks").iterdir()
    lock.unlink()
    victim = tmp_path / "victim"
    victim.write_text("precious")
    lock.symlink_to(victim)
    with pytest.raises(PathEscape, match="not a plain file"), BundleWriter(output):
        pytest.fail("entered")
    lock.unlink()
    os.mkfifo(lock)
    with pytest.raises(PathEscape, match="not a plain file"), BundleWriter(output):
        pytest.fail("entered")
    assert victim.read_text() == "precious"


def test_a_lock_directory_that_is_a_link_or_open_to_others_is_refused(output: Path, state_home: Path) -> None:
    locks = state_home / "diffkiln" / "locks"
    locks.mkdir(parents=True, mode=0o777)
    locks.chmod(0o777)
    with pytest.raises(IntegrityError, match="chmod 700"), BundleWriter(output):
        pytest.fail("entered")
    locks.rmdir()
    locks.symlink_to(output.parent)
    with pytest.raises(PathEscape), BundleWriter(output):
        pytest.fail("entered")
    assert left_beside(output) == []


# Killed


WRITE = """
import os, sys
from pathlib import Path
from tests.bundle.making import DOC, fill, manifest_of
from diffkiln.bundle import BundleWriter
"""


def heeds_interrupts() -> None:
    """For a child process: whoever started the tests in the background may have had SIGINT ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start(code: str, output: Path) -> subprocess.Popen[str]:
    child = subprocess.Popen(
        [sys.executable, "-c", WRITE + code, str(output)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
        preexec_fn=heeds_interrupts,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "writing\n"
    return child


WAIT = """
with BundleWriter(Path(sys.argv[1])) as writer:
    fill(writer)
    print("writing", flush=True)
    import time
    time.sleep(60)
"""


def test_a_killed_holders_lock_and_staging_are_taken_over(output: Path) -> None:
    child = start(WAIT, output)
    try:
        with pytest.raises(OutputBusy), BundleWriter(output):
            pytest.fail("entered")
        assert len(left_beside(output)) == 1
    finally:
        child.kill()
        child.communicate()
    assert len(left_beside(output)) == 1
    make(output)
    assert left_beside(output) == []


def test_sigint_leaves_no_trace(output: Path) -> None:
    child = start(
        WAIT.replace("with", "try:\n  with", 1).replace("\n    ", "\n      ")
        + "except KeyboardInterrupt: sys.exit(130)",
        output,
    )
    child.send_signal(signal.SIGINT)
    child.communicate(timeout=20)
    assert child.returncode == 130
    assert left_beside(output) == []
    assert not output.exists()


# Forks itself once for every step, so that all of them take the time of one start of Python. A step is any of
# the system calls that change something on the disk; the child is killed just before its n-th one. Every step
# around the renames is tried, and every ninth of the others (writing, syncing, removing).
KILLER = """
import json, signal
from diffkiln.bundle import rename, open_bundle
from diffkiln.errors import IntegrityError
from tests.killing import NAMES, killed_before
output = Path(sys.argv[1])
if sys.argv[2] == "plain":
    rename._renameat2 = lambda *_: False
def work():
    with BundleWriter(output, force=True) as writer:
        fill(writer, b"new")
        writer.publish(manifest_of)
def forked(step, at_rename=None):
    return killed_before(step, (*NAMES, "open", "write", "fsync"), work, at_rename)
os.fsync = lambda _: None  # it is slow, and no power is cut here
states = []
renames = os.waitstatus_to_exitcode(forked(10_000, os._exit))
assert renames > 40, renames
for step in sorted({*range(0, 1000, 9), *range(renames - 3, renames + 7)}):
    killed = forked(step) == signal.SIGKILL
    try:
        opened = open_bundle(output)
        opened.verify().close()
        state = opened.id
    except IntegrityError as error:
        state = str(error)
    # the next run: cleans up, and does not publish
    with BundleWriter(output, force=True):
        pass
    states.append((state, open_bundle(output).id if output.exists() else None, sorted(os.listdir(output.parent))))
    if not killed:
        break
    if sys.argv[3] == "fresh":
        import shutil
        shutil.rmtree(output, ignore_errors=True)
    elif (output / DOC).read_bytes().endswith(b"new"):
        with BundleWriter(output, force=True) as writer:
            fill(writer)
            writer.publish(manifest_of)
print(json.dumps(states))
"""


@pytest.mark.parametrize(("before", "way"), [("old", "exchange"), ("old", "plain"), ("fresh", "exchange")])
def test_sigkill_at_any_step_leaves_the_old_or_the_whole_new(output: Path, way: str, before: str) -> None:
    old = make(output.parent / "old-id")
    new = make(output.parent / "new-id", b"new")
    for name in ("old-id", "new-id"):
        shutil.rmtree(output.parent / name)
    if before == "old":
        make(output)
    done = subprocess.run(
        [sys.executable, "-c", WRITE + KILLER, str(output), way, before],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        check=False,
    )
    assert done.returncode == 0, done.stderr
    states = json.loads(done.stdout)
    assert len(states) > 15
    absent = 0
    for state, after, beside in states:
        assert beside in ([output.name], [])
        if before == "old":
            absent += "no such directory" in state
            assert after in {old, new}
            assert state in {old, new} or (way == "plain" and "no such directory" in state)
        else:
            assert state == new or "no such directory" in state
            assert after in {None, new}
    # With the exchange there is no moment without a bundle; without it there is one, which the next run mends.
    assert before == "fresh" or (absent > 0 if way == "plain" else absent == 0)
    assert states[-1][0] == new


def test_staging_of_a_living_process_or_of_another_output_stays(output: Path) -> None:
    other = output.parent / f".{output.name}2.staging-1-{'0' * 16}"
    stale = output.parent / f".{output.name}.staging-1-{'0' * 16}"
    link = output.parent / f".{output.name}.staging-2-{'0' * 16}"
    other.mkdir()
    stale.mkdir()
    link.symlink_to(other)
    alive = staging.Staging(output)
    alive.create()
    try:
        with BundleWriter(output):
            pass
        assert alive.root.is_dir()
        assert other.is_dir()
        assert link.is_symlink()
        assert not stale.exists()
    finally:
        alive.remove()
