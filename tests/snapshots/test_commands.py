"""What the commands say to other programs, and `diffkiln passes` to a person."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from diffkiln.cli import main
from diffkiln.passes.order import ORDER
from tests.conftest import DIGITS
from tests.examples.test_specs import read
from tests.frozen.kinds import KINDS
from tests.pipelines import WARNING_FILTERS
from tests.snapshots.golden import same
from tests.snapshots.specs import ready_specs

pytestmark = [pytest.mark.filterwarnings(text) for text in WARNING_FILTERS]
FROZEN = Path(__file__).parents[1] / "frozen" / "0.1.0"
#: The choice among a bundle's targets is the CPU's on which the tests run.
OF_THE_MACHINE = ("choice",)

ILLEGAL = {
    "order": [
        {"name": "quantize", "component": "transformer", "type": "int8_weight_only"},
        {"name": "fuse_qkv", "component": "transformer"},
    ],
    "options": [
        {"name": "fuse_qvk", "component": "transformer"},
        {"name": "quantize", "component": "transformer", "type": "int9"},
        {"name": "cache_schedule", "component": "transformer", "method": "fora", "interval": 2, "ratios": [1.0]},
    ],
    "components": [
        {"name": "fuse_qkv", "component": "transfomer"},
        {"name": "compile", "component": "vae", "scope": "blocks"},
    ],
}


@pytest.fixture
def said(capsys):
    """Returns what a command prints."""

    def run(*arguments: object, code: int = 0) -> str:
        assert main([str(argument) for argument in arguments]) == code
        return capsys.readouterr().out

    return run


@pytest.fixture
def for_gpus(monkeypatch, tmp_path):
    """As with a torch that has CUDA, and with what is downloaded away from the user's."""
    monkeypatch.setattr("diffkiln.exporters.aot_inductor.check.cuda_problems", lambda: iter(()))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@pytest.mark.parametrize("path", sorted(DIGITS.glob("*.json")), ids=lambda path: path.stem)
def test_check_of_an_example(path, said, for_gpus):
    same(f"commands/check/digits-{path.stem}.json", json.loads(said("check", path, "--json")))


@pytest.mark.parametrize("path", ready_specs(), ids=lambda path: path.stem)
def test_check_of_a_ready_spec(path, said, for_gpus, tmp_path):
    file = tmp_path / "spec.json"
    file.write_text(json.dumps(read(path)))
    same(f"commands/check/{path.stem}.json", json.loads(said("check", file, "--json")))


@pytest.mark.parametrize("name", ILLEGAL)
def test_check_of_what_is_illegal(name, said, tmp_path):
    spec = json.loads((DIGITS / "spec.json").read_text()) | {"passes": ILLEGAL[name]}
    spec["source"]["model"] = str(DIGITS / "model")
    file = tmp_path / "spec.json"
    file.write_text(json.dumps(spec))
    told = said("check", file, "--json", code=2 if name == "options" else 3)
    same(f"commands/check/illegal-{name}.json", json.loads(told.replace(str(file), "SPEC")))


@pytest.mark.parametrize("kind", ["engine", "cached", "variants", "controlnet"])
def test_inspect(kind, said):
    told = json.loads(said("inspect", FROZEN / kind / "bundle", "--json"))
    same(f"commands/inspect/{kind}.json", {key: value for key, value in told.items() if key not in OF_THE_MACHINE})


@pytest.mark.parametrize("kind", ["engine", "controlnet"])
def test_bill_of_materials(kind, said):
    same(f"commands/inspect/{kind}-bom.json", json.loads(said("inspect", FROZEN / kind / "bundle", "--bom")))


@pytest.mark.parametrize("kind", KINDS)
def test_programs_of_a_bundle(kind, said):
    """The JSON is the bundle's own file."""
    bundle = FROZEN / kind / "bundle"
    for path in sorted((bundle / "programs").glob("*.json")):
        told = json.loads(said("inspect", bundle, "--program", path.stem, "--json"))
        assert told == json.loads(path.read_text())


@pytest.mark.parametrize("kind", KINDS)
def test_verify(kind, said, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))  # without receipts of what other tests built
    same(f"commands/verify/{kind}.txt", said("verify", FROZEN / kind / "bundle"))


@pytest.mark.parametrize("name", ORDER)
def test_passes(name, said):
    same(f"commands/passes/{name}.txt", said("passes", name))
    same(f"commands/passes/{name}.json", json.loads(said("passes", name, "--json")))


def test_passes_are_listed_in_their_order(said):
    whole = said("passes")
    assert whole.endswith("".join(said("passes", name) for name in ORDER))
    same("commands/passes.json", [line for line in whole.splitlines() if line and not line.startswith(" ")])
    assert list(json.loads(said("passes", "--json"))) == list(ORDER)


def test_targets(said):
    same("commands/targets.json", json.loads(said("targets", "--json")))


def test_schema(said):
    """The schema of each definition by itself, which shows what a change is about."""
    schema: dict[str, Any] = json.loads(said("schema"))
    for name, definition in schema.pop("$defs").items():
        same(f"commands/schema/{name}.json", definition)
    same("commands/schema.json", schema)
