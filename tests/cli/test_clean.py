"""`diffkiln clean`: what it shows, what it frees, and what it leaves alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from diffkiln.bundle.cleaning import KINDS
from diffkiln.bundle.output import lock_output
from diffkiln.bundle.state import cache_home, state_dir
from diffkiln.cli import clean as cli_clean
from diffkiln.cli import cli, main
from diffkiln.exporters.cache import EngineCache
from tests.bundle.making import make

COMMIT = "ab" * 20
_HOLDER = """
import sys, time
from diffkiln.bundle.output import lock_output
from diffkiln.bundle.scratch import Scratch
from diffkiln.bundle.staging import Staging
from pathlib import Path

scratch = Scratch("native")
(scratch.path / "engine.so").write_bytes(bytes(1000))
lock = lock_output(Path(sys.argv[1]))
staging = Staging(Path(sys.argv[1]), resumed=True)
staging.create()
(staging.root / "half").write_bytes(bytes(500))
print("ready", flush=True)
time.sleep(600)
"""


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Caches, state and temporary folder of the test alone."""
    for name in ("DIFFKILN_CACHE_DIR", "XDG_STATE_HOME", "TMPDIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    (tmp_path / "TMPDIR").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "TMPDIR"))
    monkeypatch.setattr("diffkiln.bundle.scratch._swept", set())
    return tmp_path


@pytest.fixture
def filled(places: Path) -> dict[str, Path]:
    """A thing of each kind of cache, by kind."""
    cache, made = cache_home(), {}
    for kind in ("engines", "toolchain", "architectures", "recovered", "weights"):
        made[kind] = cache.directory(kind)
        (made[kind] / "inner").mkdir()
        (made[kind] / "inner" / "file").write_bytes(bytes(100))
    made["bundles"] = cache.directory("bundles") / "me" / "small" / COMMIT
    made["bundles"].parent.mkdir(parents=True)
    make(made["bundles"])
    made["kernels"] = state_dir("kernels") / f"{'0' * 64}.cache"
    made["kernels"].write_bytes(bytes(10))
    state_dir("receipts").joinpath("0" * 64).touch()
    return made


@pytest.fixture
def holder(places: Path):
    """A process with native copies, in the middle of a download."""
    output = cache_home().directory("bundles") / "me" / "other" / COMMIT
    output.parent.mkdir(parents=True)
    process = subprocess.Popen([sys.executable, "-c", _HOLDER, str(output)], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    assert process.stdout.readline() == "ready\n"
    yield process
    process.kill()
    process.communicate()


def shown(*arguments: str) -> dict[str, list[tuple[Path, int]]]:
    done = CliRunner().invoke(cli, ["clean", "--json", *arguments])
    assert done.exit_code == 0, done.output
    found: dict[str, list[tuple[Path, int]]] = {}
    for row in json.loads(done.stdout)["items"]:
        found.setdefault(row["kind"], []).append((Path(row["path"]), row["bytes"]))
    return found


def test_shows_kind_size_and_place_and_removes_nothing_unasked(filled: dict[str, Path]) -> None:
    done = CliRunner().invoke(
        cli,
        [
            "clean",
        ],
    )
    assert done.exit_code == 0
    for kind, path in filled.items():
        assert kind in done.output
        assert path.name[:20] in done.output.replace("\n", "")
        assert path.exists()
    assert "pass --yes" in done.output
    found = shown()
    assert {kind: [path for path, _ in items] for kind, items in found.items() if kind != "leftovers"} == {
        kind: [path] for kind, path in filled.items()
    }
    assert found["engines"][0][1] == 100
    assert found["kernels"][0][1] == 10


def test_frees_everything_with_yes_and_keeps_receipts(filled: dict[str, Path], places: Path) -> None:
    done = CliRunner().invoke(cli, ["clean", "--yes"])
    assert done.exit_code == 0
    assert not any(path.exists() for path in filled.values())
    assert [path.name for path in state_dir("receipts").iterdir()] == ["0" * 64]
    assert "nothing to free" in CliRunner().invoke(cli, ["clean", "--only", "engines"]).output


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "leftovers"])
def test_frees_only_the_kinds_that_are_named(filled: dict[str, Path], kind: str) -> None:
    assert CliRunner().invoke(cli, ["clean", "--yes", "--only", kind]).exit_code == 0
    assert [other for other, path in filled.items() if not path.exists()] == [kind]


def test_asks_where_somebody_can_answer(filled: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffkiln.cli.clean._asked", lambda items: len(items) == 1)
    assert (
        "nothing was removed"
        in CliRunner()
        .invoke(
            cli,
            [
                "clean",
            ],
        )
        .output
    )
    assert filled["engines"].exists()
    CliRunner().invoke(cli, ["clean", "--only", "engines"])
    assert not filled["engines"].exists()


def test_help_has_every_kind() -> None:
    assert tuple(cli_clean.KINDS) == KINDS


def test_another_kind_is_refused(places: Path) -> None:
    assert main(["clean", "--only", "everything"]) == 2


def test_what_a_killed_process_left_is_shown_and_freed(holder: subprocess.Popen[str], places: Path) -> None:
    assert "leftovers" not in shown("--only", "leftovers")  # it lives
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    left = dict(shown("--only", "leftovers")["leftovers"])
    assert sorted(left.values()) == [0, 500, 1000]  # a lock, a download, a native copy
    assert CliRunner().invoke(cli, ["clean", "--yes", "--only", "leftovers"]).exit_code == 0
    assert not any(path.exists() for path in left)
    assert shown("--only", "leftovers") == {}


def test_what_a_living_process_uses_stays(holder: subprocess.Popen[str], filled: dict[str, Path], places: Path) -> None:
    native = list((places / "TMPDIR").iterdir())
    cache = EngineCache()
    assert cache.get("0" * 64) is None  # as a build that looks for an engine
    lock = lock_output(filled["bundles"])
    done = CliRunner().invoke(cli, ["clean", "--yes"])
    lock.release()
    assert done.output.count("another process uses it") == 5
    for kind in ("engines", "toolchain", "architectures", "recovered", "bundles"):
        assert filled[kind].exists()
    assert native
    assert list((places / "TMPDIR").iterdir()) == native
    del cache
    CliRunner().invoke(cli, ["clean", "--yes"])
    assert not filled["engines"].exists()


def test_caches_of_another_user_are_refused(filled: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a directory to another user")
    os.chown(filled["engines"], 65533, 65533)
    assert main(["clean", "--yes"]) == 6
    assert "belongs to another user" in capsys.readouterr().err
    assert filled["engines"].exists()


def test_cache_may_be_a_link_to_a_larger_disk(filled: dict[str, Path], places: Path) -> None:
    (places / "DIFFKILN_CACHE_DIR").rename(places / "disk")
    (places / "DIFFKILN_CACHE_DIR").symlink_to(places / "disk")
    assert shown("--only", "engines") == {"engines": [(places / "disk" / "engines", 100)]}
