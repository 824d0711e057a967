"""Temporary folders: they go with their process, also where it is killed, and nobody's that lives is taken."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from diffkiln.bundle import open_bundle, scratch
from diffkiln.bundle.scratch import Scratch
from diffkiln.errors import IntegrityError, SystemRefused
from tests.bundle.making import ENGINE
from tests.bundle.test_private import OTHER, as_root

pytestmark = pytest.mark.usefixtures("private_tmp")

_HOLDER = """
import sys, tempfile, time
from diffkiln.bundle import open_bundle
from diffkiln.bundle.scratch import Scratch

tempfile.tempdir = sys.argv[1]
verified = open_bundle(sys.argv[2]).verify()
copy = verified.native_copy("engines/cpu/transformer/Block")
offload = Scratch("offload")
print("ready", flush=True)
time.sleep(600)
"""

#: A process of its own: one that runs many tests has threads, and what is forked from it may wait for them for ever.
_FORKING = """
import os, signal, sys, tempfile
from diffkiln.bundle.scratch import Scratch

tempfile.tempdir = sys.argv[1]
folder = Scratch("test").path
if os.fork() == 0:
    os.read(int(sys.argv[2]), 1)
    os._exit(0)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(autouse=True)
def anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a process that has just started."""
    monkeypatch.setattr(scratch, "_swept", set())


@pytest.fixture
def holder(made: Path, private_tmp: Path):
    """A process that holds two folders."""
    command = [sys.executable, "-c", _HOLDER, str(private_tmp), str(made)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    assert process.stdout.readline() == "ready\n"
    yield process
    process.kill()
    process.communicate()


def test_folder_is_private_and_goes_when_it_is_done_with(private_tmp: Path) -> None:
    before = os.umask(0)
    try:
        with scratch.scratch("test") as folder:
            (folder / "inner").mkdir()
            assert stat.S_IMODE(folder.stat().st_mode) == 0o700
            assert folder.parent == private_tmp
    finally:
        os.umask(before)
    assert list(private_tmp.iterdir()) == []


def test_what_a_killed_process_left_is_removed_at_the_next_start(
    holder: subprocess.Popen[str], made: Path, private_tmp: Path
) -> None:
    left = set(private_tmp.iterdir())
    assert len(left) == 2
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert set(private_tmp.iterdir()) == left
    with open_bundle(made).verify() as verified:
        copy = verified.native_copy(ENGINE)
        assert list(private_tmp.iterdir()) == [copy]


def test_what_a_living_process_holds_stays(holder: subprocess.Popen[str], private_tmp: Path) -> None:
    left = set(private_tmp.iterdir())
    with scratch.scratch("test"):
        assert left < set(private_tmp.iterdir())
    assert set(private_tmp.iterdir()) == left
    assert list(scratch.dead(private_tmp)) == []


def test_folder_of_a_parent_that_died_stays_while_a_forked_child_lives(private_tmp: Path) -> None:
    """The lock is inherited; the child's own end gives the folder free."""
    read, write = os.pipe()
    command = [sys.executable, "-c", _FORKING, str(private_tmp), str(read)]
    assert subprocess.run(command, pass_fds=[read], check=False).returncode == -signal.SIGKILL
    os.close(read)
    (folder,) = private_tmp.iterdir()
    scratch.remove_dead(private_tmp)
    assert folder.exists()
    os.close(write)  # which ends the child
    for _ in range(1000):
        scratch.remove_dead(private_tmp)
        if not folder.exists():
            return
        time.sleep(0.01)
    pytest.fail("the folder stayed")


@as_root
def test_folder_of_another_user_and_a_link_stay(private_tmp: Path, tmp_path: Path) -> None:
    theirs, link = private_tmp / "diffkiln-native-aaaaaaaaaaaaaaaa", private_tmp / "diffkiln-native-bbbbbbbbbbbbbbbb"
    theirs.mkdir()
    os.chown(theirs, OTHER, OTHER)
    (tmp_path / "precious").mkdir()
    link.symlink_to(tmp_path / "precious")
    (private_tmp / "diffkiln-export-x1y2z3_9").mkdir()
    with scratch.scratch("test"):
        pass
    assert len(list(private_tmp.iterdir())) == 3
    assert (tmp_path / "precious").exists()


def test_folders_lie_in_the_state_directory_where_others_could_rename_them(private_tmp: Path, state_home: Path) -> None:
    private_tmp.chmod(0o777)
    with scratch.scratch("test") as folder:
        assert folder.parent == state_home / "diffkiln" / "scratch"
    private_tmp.chmod(0o1777)
    with scratch.scratch("test") as folder:
        assert folder.parent == private_tmp


def test_without_a_safe_place_there_is_no_folder(private_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    private_tmp.chmod(0o777)
    monkeypatch.setenv("XDG_STATE_HOME", "/dev/null")
    with pytest.raises(IntegrityError, match="Set TMPDIR to a directory of yours"):
        Scratch("test")


def test_a_folder_that_is_taken_before_it_is_locked_is_made_again(
    private_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, turns = scratch._lock, iter([True, False])

    def late(descriptor: int) -> None:
        if next(turns):
            scratch.remove_dead(private_tmp)
        lock(descriptor)

    monkeypatch.setattr(scratch, "_lock", late)
    with scratch.scratch("test") as folder:
        assert list(private_tmp.iterdir()) == [folder]


def test_native_code_lies_where_programs_run(tmp_path, monkeypatch):
    """The temporary directory may be mounted noexec; dlopen's words for that say nothing of it."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(scratch, "closed_to_others", lambda _: True)
    assert scratch.folder_to_run() == tmp_path
    monkeypatch.setattr(scratch, "runs_programs", lambda place: place != tmp_path)
    assert scratch.folder_to_run() != tmp_path
    monkeypatch.setattr(scratch, "runs_programs", lambda _: False)
    with pytest.raises(SystemRefused, match=r"mounted noexec: .*Set TMPDIR"):
        scratch.folder_to_run()


def test_a_mount_without_programs_is_known():
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    without = [fields[1] for fields in mounts if "noexec" in fields[3].split(",") and Path(fields[1]).is_dir()]
    assert not any(scratch.runs_programs(Path(place)) for place in without)
    assert scratch.runs_programs(Path(sys.executable).parent)
