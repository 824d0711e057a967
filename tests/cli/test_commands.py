"""Every command is run: with what it is for, from a folder as a user has it."""

from __future__ import annotations

import shutil

import pytest

from diffkiln.cli import cli, main
from tests.bundle.keys import make_key
from tests.conftest import DIGITS
from tests.exporters.regions import engine_cache
from tests.hub.conftest import UPLOAD_WARNING, hub
from tests.hub.server import Server
from tests.pipelines import WARNING_FILTERS

__all__ = ["hub"]

pytestmark = [pytest.mark.filterwarnings(text) for text in (*WARNING_FILTERS, UPLOAD_WARNING)]

#: The command's arguments, its exit code, and words that it prints.
COMMANDS = {
    "init": (["init", "model", "-o", "first.json"], 0, "first.json"),
    "check": (["check", "spec.json"], 0, "legal"),
    "compile": (["compile", "spec.json", "-o", "new"], 0, "diffkiln run new"),
    "add-target": (["add-target", "bundle", "cpu-x86-64-v2", "-o", "two"], 0, "two"),
    "strip": (["strip", "bundle", "--target", "cpu-x86-64-v4"], 2, "has no engines for"),
    "retune": (["retune", "bundle"], 3, "engines for a CPU are not tuned"),
    "passes": (["passes", "quantize", "compile"], 0, "int8_weight_only"),
    "targets": (["targets"], 0, "nvidia-h200"),
    "schema": (["schema"], 0, "json-schema.org"),
    "run": (["run", "bundle", "--prompt", "seven", "-o", "seven.png"], 0, "seven.png"),
    "serve": (["serve", "bundle", "--host", "192.0.2.1"], 5, "cannot listen on 192.0.2.1 port 8000"),
    "bench": (["bench", "bundle", "--starts", "0", "--warmup", "0", "--runs", "1"], 0, "one step"),
    "evaluate": (["evaluate", "bundle", "--against", "bundle", "--prompts", "prompts.txt"], 0, "psnr"),
    "tune": (["tune", "spec.json", "-o", "tuning"], 2, "holds no choices"),
    "inspect": (["inspect", "bundle"], 0, "cpu-x86-64-v3"),
    "memory": (["memory", "bundle"], 0, "each call brings in"),
    "lora": (["lora", "convert", "style.bin", "--for", "bundle", "-o", "new.safetensors"], 2, "a pickle can run code"),
    "push": (["push", "bundle", "me/digits"], 0, "hf://me/digits@"),
    "pull": (["pull", "me/nothing", "-o", "pulled"], 2, "me/nothing"),
    "verify": (["verify", "bundle"], 0, "all as hashed"),
    "sign": (["sign", "bundle", "--key", "key.pem"], 0, "signed with"),
    "clean": (["clean", "--only", "kernels", "--json"], 0, "["),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, digits_bundle):
    made = tmp_path_factory.mktemp("home")
    shutil.copytree(digits_bundle, made / "bundle")
    shutil.copytree(DIGITS / "model", made / "model")
    shutil.copy(DIGITS / "spec.json", made)
    (made / "prompts.txt").write_text("seven\n")
    make_key(made, "key")
    return made


def test_every_command_is_here():
    assert set(COMMANDS) == set(cli.commands)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_runs(name, folder, hub: Server, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    for module in ("compile", "retarget"):
        monkeypatch.setattr(f"diffkiln.compiler.{module}.EngineCache", engine_cache)
    arguments, code, words = COMMANDS[name]
    assert main(arguments) == code
    told = capsys.readouterr()
    assert words in told.out + told.err
    assert "Traceback" not in told.err
    assert "diffkiln failed" not in told.err


def test_what_inspect_and_passes_print_fits_80_columns(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    for arguments in (["inspect", "bundle"], ["passes"], ["targets"], ["check", "spec.json"]):
        assert main(arguments) == 0
        wide = [line for line in capsys.readouterr().out.splitlines() if len(line.rstrip()) > 80]
        assert not wide, arguments
