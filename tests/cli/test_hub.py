"""`diffkiln push` and `diffkiln pull`: what they print, and the exit code of what goes wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from diffkiln.bundle import open_bundle
from diffkiln.cli import main
from tests.bundle import making
from tests.hub.conftest import REPO, UPLOAD_WARNING, V3, V4, bundle, contents, hub, output, published
from tests.hub.server import WRITER, Server

__all__ = ["bundle", "hub", "output", "published"]

pytestmark = pytest.mark.filterwarnings(UPLOAD_WARNING)


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that the engines for V3 fit, and those for V4 do not."""
    from diffkiln.errors import Incompatible, Problem

    def check(_: object, isa: str | None, native: bool) -> None:
        if isa != "x86-64-v3":
            raise Incompatible(problems=[Problem("cpu_isa", f"no {isa} here")])

    monkeypatch.setattr("diffkiln.runtime.targets.check_target", check)


def test_push_prints_the_address(hub: Server, bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["push", str(bundle), REPO, "--private"]) == 0
    assert capsys.readouterr().out.strip() == f"hf://{REPO}@{hub.repositories[REPO].head}"
    assert hub.repositories[REPO].private
    assert main(["push", str(bundle), REPO, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told == {"repo": REPO, "commit": hub.repositories[REPO].head, "sent": [], "removed": []}


def test_pull_fetches_the_engines_that_fit(
    hub: Server, bundle: Path, published: str, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["pull", REPO, "-o", str(output)]) == 0
    with open_bundle(bundle) as whole:
        assert capsys.readouterr().out.strip() == f"{output}  {whole.id}"
    with open_bundle(output) as pulled:
        assert pulled.targets == (V3,)
    assert main(["verify", str(output)]) == 0
    assert f"partial: engines for {V3} alone" in capsys.readouterr().out
    assert main(["inspect", str(output)]) == 0
    assert f"only the engines for {V3} are here" in capsys.readouterr().out
    assert main(["pull", REPO, "-o", str(output), "--all-targets", "--force", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["targets"] == [V3, V4]
    assert told["commit"] == published
    assert told["received_bytes"] > 16384


def test_pull_takes_targets_by_name(hub: Server, published: str, output: Path) -> None:
    assert main(["pull", REPO, "-o", str(output), "--target", V4, "--revision", published]) == 0
    with open_bundle(output) as pulled:
        assert pulled.targets == (V4,)
    assert main(["pull", REPO, "-o", str(output), "--target", V4, "--all-targets"]) == 2


def test_machine_that_fits_no_target_hears_of_the_options(
    hub: Server, bundle: Path, output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    making.make_for(tmp_path / "other", (V4,))
    hub.publish(REPO, contents(tmp_path / "other"))
    assert main(["pull", REPO, "-o", str(output)]) == 5
    error = capsys.readouterr().err
    assert "no x86-64-v4 here" in error
    assert "--target" in error
    assert not output.exists()


def test_exit_codes(hub: Server, published: str, output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pull", "me/nothing", "-o", str(output)]) == 2
    assert main(["pull", REPO, "-o", str(output), "--target", "h100"]) == 2
    assert "h100" in capsys.readouterr().err
    files = dict(hub.repositories[REPO].files)
    files["programs/v0.json"] = b"{}"
    hub.publish(REPO, files)
    assert main(["pull", REPO, "-o", str(output)]) == 6
    error = capsys.readouterr().err
    assert "programs/v0.json" in error
    assert "Traceback" not in error


def test_settings_come_from_the_environment(
    hub: Server, bundle: Path, output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "hf")}
    environment = os.environ | own | {"HF_TOKEN": WRITER}

    def run(*arguments: str, **changed: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "diffkiln", *arguments]
        return subprocess.run(command, env=environment | changed, capture_output=True, text=True, check=False)

    done = run("push", str(bundle), REPO)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"hf://{REPO}@")
    done = run("pull", REPO, "-o", str(output), "--all-targets", HF_HUB_OFFLINE="1")
    assert done.returncode == 2
    assert "HF_HUB_OFFLINE is set" in done.stderr
