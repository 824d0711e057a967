"""The help of every command, as a terminal of 80 columns shows it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from diffkiln.cli import cli, main
from diffkiln.cli.group import SECTIONS

GOLDEN = Path(__file__).parents[1] / "golden" / "help"
SHOWN = sorted(name for name, command in cli.commands.items() if not command.hidden)


@pytest.mark.parametrize("name", ["", *SHOWN])
def test_help_is_the_golden_one_and_fits_80_columns(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main([*name.split(), "--help"]) == 0
    told = capsys.readouterr().out
    assert max(map(len, told.splitlines())) <= 80
    path = GOLDEN / f"{name or 'diffkiln'}.txt"
    if os.environ.get("DIFFKILN_UPDATE_GOLDEN"):
        GOLDEN.mkdir(exist_ok=True)
        path.write_text(told)
    assert told == path.read_text()


def test_every_command_stands_in_one_section():
    listed = [name for names in SECTIONS.values() for name in names]
    assert sorted(listed) == SHOWN


@pytest.mark.parametrize("name", SHOWN)
def test_a_summary_is_short_and_whole(name):
    summary = cli.commands[name].get_short_help_str(limit=1000)
    assert len(summary) <= 45
    assert summary.endswith(".")
    assert "..." not in summary


def test_help_of_every_option_is_a_sentence():
    for name in SHOWN:
        for option in cli.commands[name].params:
            text = getattr(option, "help", None)
            if option.param_type_name == "option" and not getattr(option, "hidden", False):
                assert text, f"{name} {option.name}"
                assert text[0].isupper() or text.startswith("cpu"), text
                assert text.rstrip().endswith((".", "[required]")), text


def test_the_old_way_of_adding_a_target_works_and_is_not_shown(capsys):
    assert main(["compile", "--help"]) == 0
    assert "--add-target" not in capsys.readouterr().out
    assert main(["compile", "nowhere", "--add-target", "cpu-x86-64-v2"]) == 6
    old = capsys.readouterr().err
    assert main(["add-target", "nowhere", "cpu-x86-64-v2"]) == 6
    assert capsys.readouterr().err == old


def completed(words: str, **more: str) -> list[str]:
    """What the shell is offered for the last of some words."""
    count = str(len(words.split(" ")) - 1)
    environment = {**os.environ, "_DIFFKILN_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": count}
    command = [sys.executable, "-c", "import sys; from diffkiln.cli import main; sys.exit(main())"]
    done = subprocess.run(command, env=environment | more, capture_output=True, text=True, check=True)
    return [line.partition(",")[2] for line in done.stdout.splitlines()]


def test_the_shell_completes_commands_targets_and_passes():
    assert completed("diffkiln ins") == ["inspect"]
    assert completed("diffkiln add-target bundle nvidia-h2") == ["nvidia-h200"]
    assert completed("diffkiln passes fuse_") == ["fuse_lora", "fuse_qkv"]


def test_the_script_for_the_shell_is_printed():
    environment = {**os.environ, "_DIFFKILN_COMPLETE": "zsh_source"}
    command = [sys.executable, "-c", "import sys; from diffkiln.cli import main; sys.exit(main())"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "compdef _diffkiln_completion diffkiln" in done.stdout
