"""The ledger: what each pass costs adds up to what the bundle costs, and a floor that is not kept names the pass."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

import diffkiln
from diffkiln.bundle import open_bundle
from diffkiln.bundle.evidence import costs_of
from diffkiln.cli import main
from diffkiln.compiler.gates import ReadyGate
from diffkiln.compiler.ledger import Ledger, LedgerEntry
from diffkiln.compiler.metrics import About
from diffkiln.errors import QualityError
from diffkiln.spec.quality import Gate
from tests.conftest import DIGITS
from tests.pipelines import WARNING_FILTERS

pytestmark = [pytest.mark.filterwarnings(text) for text in WARNING_FILTERS]
FUSE = {"name": "fuse_qkv", "component": "transformer"}
INT8 = {"name": "quantize", "component": "transformer", "type": "int8_weight_only", "exclude": ["*norm*"]}
INT4 = {"name": "quantize", "component": "transformer", "type": "int4_weight_only", "group_size": 32}
NF4 = {"name": "quantize", "component": "text_encoder", "backend": "bitsandbytes", "type": "nf4"}
MASK = {"name": "cache_schedule", "component": "transformer", "method": "mask", "steps": [1, 1, 1, 1, 0, 1, 0, 1]}


def spec_of(passes: list, floor: float) -> dict:
    made = json.loads((DIGITS / "spec.json").read_text())
    made["source"]["model"] = str(DIGITS / "model")
    gates = [{"metric": "psnr", "at_least": floor, "prompts": "prompts.txt"}]
    return made | {"passes": passes, "quality": gates, "runtime": {}}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "prompts.txt").write_text("a handwritten seven\n")
    return tmp_path


@pytest.mark.more
@pytest.mark.slow
def test_the_ledger_adds_up_and_is_evidence_in_the_bundle(folder, capsys):
    built = diffkiln.compile(spec_of([FUSE, INT8, NF4, MASK], 15), folder / "bundle", base=folder, ledger="each")
    with open_bundle(built.path) as bundle:
        (table,) = costs_of(bundle.build)
    names = ["fuse_qkv transformer", "quantize transformer", "quantize text_encoder", "cache_schedule transformer"]
    values = dict(table.cumulative)
    assert list(values) == [*names, "bundle"]
    assert list(table.each) == names
    assert values["fuse_qkv transformer"] > 100
    assert values["quantize transformer"] > values["quantize text_encoder"] >= values["cache_schedule transformer"]
    assert values["bundle"] == pytest.approx(values["cache_schedule transformer"], abs=0.1)
    assert table.each["cache_schedule transformer"] == pytest.approx(36, abs=15)
    spec = json.loads((built.path / "spec.json").read_text())
    assert spec["quality"][0]["prompts"].startswith("sha256:")
    assert "| quantize text_encoder |" in (built.path / "README.md").read_text()
    assert main(["inspect", str(built.path)]) == 0
    told = capsys.readouterr().out
    assert "quality   psnr at least 15" in told
    assert max(map(len, told.splitlines())) <= 80
    assert main(["inspect", str(built.path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ledger"]["tables"]


@pytest.mark.slow
def test_tables_that_are_computed_once_cost_nothing(folder):
    hoist = {"name": "hoist", "component": "transformer"}
    built = diffkiln.compile(spec_of([FUSE, hoist], 100), folder / "bundle", base=folder)
    with open_bundle(built.path) as bundle:
        (table,) = costs_of(bundle.build)
    assert dict(table.cumulative)["hoist transformer"] > 100


@pytest.mark.more
@pytest.mark.slow
def test_what_recover_regains_stands_in_the_ledger_and_keeps_a_floor(folder, monkeypatch):
    monkeypatch.setenv("DIFFKILN_CACHE_DIR", str(folder / "cache"))
    recover = {"name": "recover", "component": "transformer", "prompts": "prompts.txt", "rank": 4}
    passes = [FUSE, INT4, recover | {"pictures": 24, "updates": 80}]
    built = diffkiln.compile(spec_of(passes, 42), folder / "bundle", base=folder, ledger="each")
    with open_bundle(built.path) as bundle:
        (table,) = costs_of(bundle.build)
    values = dict(table.cumulative)
    assert values["quantize transformer"] < 42 < values["recover transformer"]
    assert values["bundle"] == pytest.approx(values["recover transformer"], abs=0.1)
    assert dict(table.each)["recover transformer"] is None


@pytest.mark.slow
def test_a_floor_that_int4_cannot_keep_fails_the_compile_and_names_it(folder, capsys):
    (folder / "spec.json").write_text(json.dumps(spec_of([FUSE, INT4], 60)))
    assert main(["compile", str(folder / "spec.json"), "-o", str(folder / "bundle")]) == 4
    told = capsys.readouterr().err
    assert "psnr at least 60 is asked for" in told
    assert "So quantize transformer cost it" in told
    assert "after fuse_qkv transformer it was" in told
    assert not (folder / "bundle").exists()


def ledger(*values: float | None) -> Ledger:
    gate = Gate(metric="psnr", at_least=30, prompts="x")
    ready = ReadyGate(gate, "$.quality[0]", ("a",), (0,), About(32, 32))
    names = [f"pass {number}" for number in range(len(values) - 1)] + ["bundle"]
    rows = (
        LedgerEntry(name, {"$.quality[0]": value}, "" if value else "why")
        for name, value in zip(names, values, strict=True)
    )
    return Ledger((ready,), tuple(rows))


def test_engines_that_cost_too_much_are_named():
    with pytest.raises(QualityError, match=r"after pass 0 it was 50\. So the engines cost it"):
        ledger(50, 20).judged()


def test_a_pass_that_regains_judges_what_came_before_it():
    rows = (
        LedgerEntry("quantize", {"$.quality[0]": 20.0}),
        LedgerEntry("recover", {"$.quality[0]": 40.0}, regains=True),
    )
    kept = replace(ledger(50, 39), cumulative=(ledger(50, 0).cumulative[0], *rows))
    assert kept.judged() is kept
    worse = replace(kept, cumulative=(*kept.cumulative[:2], replace(rows[1], values={"$.quality[0]": 28.0})))
    with pytest.raises(QualityError, match=r"psnr is 28 after recover; after pass 0 it was 50\. So quantize cost it"):
        worse.judged()


def test_rows_that_were_not_measured_are_kept_and_judge_nothing():
    (table,) = ledger(50, None).judged().as_json()["tables"]
    assert table["cumulative"][1] == {"pass": "bundle", "value": None, "reason": "why"}


def test_without_gates_there_is_no_evidence():
    assert Ledger(()).as_json() == {}
