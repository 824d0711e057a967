"""What `bench` measures of the digits bundle, and what it refuses before anything is loaded."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch

import diffkiln
from diffkiln.cli import main
from diffkiln.errors import Incompatible, SourceError, SpecError
from diffkiln.evaluate.bench import Bench, Measured, Rounds
from diffkiln.evaluate.energy import Meter
from diffkiln.evaluate.numbers import spread_of
from tests.conftest import DIGITS
from tests.pipelines import WARNING_FILTERS

pytestmark = [pytest.mark.filterwarnings(text) for text in WARNING_FILTERS]
ONCE = Rounds(starts=1, warmup=1, runs=2)


@pytest.fixture(scope="module")
def measured(digits_bundle):
    """The bundle, and the pipeline that it was made of."""
    return diffkiln.bench(digits_bundle, ["eager"], source=DIGITS / "model", rounds=ONCE)


@pytest.mark.more
@pytest.mark.slow
class TestMeasured:
    def test_every_time_is_there_and_phases_add_up(self, measured):
        for way in measured.ways:
            seconds = {name: found.median for name, found in way.seconds.items()}
            assert all(value > 0 for value in seconds.values())
            assert seconds["load"] < seconds["start"]
            assert way.seconds["step"].count == 2 * 8
            parts = sum(way.seconds[name].lowest for name in ("encode", "denoise", "decode"))
            assert parts <= way.seconds["call"].highest

    def test_a_bundle_starts_sooner_and_takes_less_memory_than_diffusers(self, measured):
        bundle, eager = measured.ways
        assert bundle.seconds["start"].median < eager.seconds["start"].median
        assert bundle.host < eager.host

    def test_what_a_call_moves_and_takes_is_what_was_planned(self, measured, digits_bundle):
        bundle, eager = measured.ways
        plan = next(iter(diffkiln.plan_memory(digits_bundle).values()))["call"].residency
        assert (bundle.planned, bundle.moved) == (plan.peak, plan.brought)
        assert (eager.planned, eager.moved) == (None, None)

    def test_what_the_machine_allows_stands_beside_what_was_measured(self, measured):
        bundle, eager = measured.ways[0], measured.ways[-1]
        assert 0 < bundle.predicted["step"] < bundle.predicted["denoise"] < bundle.predicted["call"]
        assert bundle.as_json()["predicted_seconds"] == bundle.predicted
        assert not eager.predicted

    def test_what_was_not_measured_is_null_in_json(self, measured):
        told = measured.as_json()
        assert json.loads(json.dumps(told)) == told
        for way in told["ways"]:
            told_by = set(Meter(torch.device("cpu")).joules())  # most machines let nobody but root read a counter
            assert set(way["joules_per_image"] or {}) == told_by
            assert way["peak_bytes"]["host"] > 0
        assert {"processor", "versions", "load"} <= told["machine"].keys()

    def test_a_process_that_cannot_load_says_why(self, digits_bundle, tmp_path):
        broken = shutil.copytree(digits_bundle, tmp_path / "broken")
        file = next((broken / "weights" / "vae").iterdir())
        file.write_bytes(bytes(file.stat().st_size))
        with pytest.raises(Incompatible, match=r"broken cannot be measured: .*weights/vae"):
            diffkiln.bench(broken, rounds=Rounds(1, 0, 0))


def test_a_way_that_there_is_not_is_refused_before_anything_is_loaded(digits_bundle):
    with pytest.raises(SpecError, match="--against nowhere: there is no bundle and no model"):
        diffkiln.bench(digits_bundle, ["nowhere"])


def test_another_model_is_not_taken_for_the_source(digits_bundle, tmp_path):
    other = shutil.copytree(DIGITS / "model", tmp_path / "other")
    (other / "scheduler" / "scheduler_config.json").write_text("{}")
    with pytest.raises(SourceError, match="is not the model that the bundle was made from"):
        diffkiln.bench(digits_bundle, ["eager"], source=other)


def test_an_unknown_source_is_asked_for(digits_bundle, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    with pytest.raises(SourceError, match="--source"):
        diffkiln.bench(digits_bundle, ["eager"])


def test_the_builder_s_machine_knows_the_source(digits_bundle, monkeypatch):
    from diffkiln.bundle import open_bundle
    from diffkiln.compiler.origin import origin_of, remember_source
    from diffkiln.evaluate.ways import read_spec
    from diffkiln.spec.model import Source

    with open_bundle(digits_bundle) as bundle:
        remember_source(bundle.id, Source(model="model", dtype="float32"), DIGITS)
        origin = origin_of(bundle.id, read_spec(bundle))
    assert origin.model.folder == DIGITS / "model"
    assert origin.plain
    assert origin.dtypes["vae"] == "float32"


def test_bundles_of_different_sizes_are_not_compared():
    from diffkiln.evaluate.calls import Call
    from diffkiln.evaluate.ways import Way, check_sizes

    small, large = (Way(str(side), {}, Call(fixed={"height": side, "width": side})) for side in (32, 64))
    with pytest.raises(SpecError, match="height is 32 in one and 64 in the other"):
        check_sizes(small, large)


def test_a_table_fits_80_columns_and_says_what_was_not_measured(capsys):
    from diffkiln.cli.printing_measured import print_bench

    seconds = dict.fromkeys(("start", "load", "call", "encode", "denoise", "decode", "step"), spread_of([1.25, 1.5]))
    told = spread_of([0.5])
    one = Measured(
        "a bundle with a rather long name", {**seconds, "step": None}, told, 10**9, None, None, joules={"cpu": 12.5}
    )
    machine = {"processor": "A processor, 2 cores", "versions": "torch 2", "threads": "2", "load": "0.0"}
    print_bench(Bench("id", (one,) * 4, machine, ONCE, {}))
    told = capsys.readouterr().out
    assert max(map(len, told.splitlines())) <= 80
    assert "not measured" in told
    assert "1.38 (1.25–1.5) s" in told
    assert "12.5 J an image" in told


def test_a_bundle_is_measured_without_diffusers(digits_bundle):
    """The process of a bundle imports neither diffusers nor the compiler."""
    code = (
        "import sys, diffkiln.evaluate.bench, diffkiln.evaluate.child;"
        "print([name for name in sys.modules if name.split('.')[0] in ('diffusers', 'transformers', 'torchmetrics')"
        " or name.startswith('diffkiln.compiler')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_command_reports_a_wrong_way(digits_bundle, capsys):
    assert main(["bench", str(digits_bundle), "--against", "nowhere"]) == 2
    assert "there is no bundle" in capsys.readouterr().err
