"""What a spec leaves to measurement: which ways are legal, which is taken, and what is said of it."""

from __future__ import annotations

import json

import pytest

import diffkiln
from diffkiln.compiler.choosing import Choice, Measured, choices_of, measure, settled
from diffkiln.compiler.stages import Stages
from diffkiln.errors import BuildError, IllegalPlan, Problem, SpecError
from diffkiln.spec import PassEntry, parse_spec
from tests.conftest import DIGITS
from tests.exporters.regions import engine_cache


def spec_with(*passes, **fields):
    written = json.loads((DIGITS / "spec.json").read_text()) | {"passes": list(passes)} | fields
    written["source"]["model"] = str(DIGITS / "model")
    return written


AUTO = {"name": "compile", "component": "transformer", "backend": "auto"}
SCHEDULER = {"name": "compile", "component": "scheduler", "backend": "auto"}
VAE = {"name": "compile", "component": "vae", "scope": "whole", "backend": "auto"}


def only(*legal):
    """A check that takes these backends."""

    def check(spec):
        for entry in spec.passes:
            if entry.options["backend"] not in legal:
                raise IllegalPlan(problems=[Problem("$.passes[0]", "an operator is missing", "Choose another.")])

    return check


def test_the_ways_are_the_backends_that_are_legal_and_compile_nothing_at_load():
    (choice,) = choices_of(parse_spec(spec_with(AUTO)), lambda spec: None)
    assert {"aot_inductor", "onnx", "openvino"} <= choice.ways.keys()
    assert "torch_compile" not in choice.ways
    (choice,) = choices_of(parse_spec(spec_with(AUTO)), only("onnx"))
    assert list(choice.ways) == ["onnx"]


def test_where_none_is_legal_each_backend_says_why():
    with pytest.raises(IllegalPlan) as caught:
        choices_of(parse_spec(spec_with(AUTO)), only())
    assert "$.passes[0]: aot_inductor: an operator is missing. Choose another." in str(caught.value)


def test_other_options_stay_as_they_are():
    (choice,) = choices_of(parse_spec(spec_with(VAE)), lambda spec: None)
    chosen = settled(parse_spec(spec_with(VAE)), [choice], "onnx").passes[0]
    assert chosen.options == {"component": "vae", "scope": "whole", "backend": "onnx"}


def test_check_says_what_compile_will_measure():
    plan = diffkiln.check(spec_with(AUTO))
    assert any("compile builds the bundle with each, and takes the fastest" in notice for notice in plan.notices)
    assert plan.spec.passes[0].options["backend"] == "aot_inductor"


def test_options_of_one_backend_leave_that_one():
    """Every other one refuses the option, so nothing is left to measure."""
    plan = diffkiln.check(spec_with(AUTO | {"inference_precision": "f32"}))
    assert plan.spec.passes[0].options["backend"] == "openvino"


# -- what is taken --


def choice(index, component, *names):
    entries = {name: PassEntry(name="compile", component=component, backend=name) for name in names}
    return Choice(index, component, entries)


def test_each_component_takes_its_fastest():
    choices = [choice(0, "transformer", "a", "b"), choice(1, "vae", "b")]
    measured = Measured(choices)
    assert measured.names == ("a", "b")
    measured.add("a", {"transformer": 2.0, "vae": 1.0})
    measured.add("b", {"transformer": 3.0, "vae": 4.0})
    spec, notices = measured.taken(parse_spec(spec_with(AUTO, VAE)))
    assert [entry.options["backend"] for entry in spec.passes] == ["a", "b"]
    assert notices[0] == "$.passes[0]: a for transformer, 2 s a call (b 3 s)"


def test_one_that_cannot_be_built_is_left_out_and_told():
    measured = Measured([choice(0, "vae", "a", "b")])
    measured.fail("a", BuildError("no room"))
    measured.add("b", {"vae": 1.0})
    spec, notices = measured.taken(parse_spec(spec_with(VAE)))
    assert spec.passes[0].options["backend"] == "b"
    assert notices == ("$.passes[0]: b for vae, 1 s a call (a not built: no room)",)
    measured = Measured([choice(0, "vae", "a", "b")])
    measured.fail("a", BuildError("no room"))
    measured.fail("b", BuildError("no time"))
    with pytest.raises(BuildError, match="nothing that fits could be built: a: no room; b: no time"):
        measured.taken(parse_spec(spec_with(VAE)))


def test_one_way_alone_is_not_measured():
    measured = Measured([choice(0, "vae", "a")])
    assert measured.names == ()
    assert measured.taken(parse_spec(spec_with(VAE)))[1] == ("$.passes[0]: a for vae, the only one that fits",)


def test_several_targets_are_refused(tmp_path):
    targets = [{"device": "cpu"}, {"device": "cpu", "isa": "x86-64-v4"}]
    with pytest.raises(SpecError, match="measured for one machine, and the spec has 2 targets"):
        diffkiln.compile(spec_with(AUTO, target=targets), tmp_path / "bundle", cache=engine_cache())


def test_a_bundle_of_several_processes_is_refused(tmp_path):
    spec = parse_spec(spec_with(AUTO, target={"device": "cpu", "parallel": {"sequence": 2}}))
    with pytest.raises(SpecError, match="measured in one process"):
        measure(spec, [choice(0, "transformer", "a", "b")], lambda *_: pytest.fail("built"), tmp_path, Stages())


def test_another_machine_is_refused_before_anything_is_built(tmp_path, monkeypatch):
    monkeypatch.setattr("diffkiln.compiler.choosing.why_not_here", lambda target: "this machine has no such CPU")
    with pytest.raises(SpecError, match=r"not this one: this machine has no such CPU. Name one way"):
        diffkiln.compile(spec_with(AUTO), tmp_path / "bundle", cache=engine_cache())
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_exists_is_refused_before_anything_is_measured(tmp_path):
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "thesis.txt").touch()
    with pytest.raises(SpecError, match="bundle"):
        diffkiln.compile(spec_with(AUTO), tmp_path / "bundle", cache=engine_cache())


@pytest.mark.more
def test_a_bundle_has_the_backend_that_was_fastest(tmp_path):
    """The bundle's own spec names it, and nothing else is left behind."""
    spec = spec_with(SCHEDULER)
    built = diffkiln.compile(spec, tmp_path / "auto", cache=engine_cache())
    (notice,) = [text for text in built.notices if text.startswith("$.passes[0]: ")]
    assert "s a call (" in notice
    taken = notice.split()[1]
    assert all(name in notice for name in ("aot_inductor", "onnx"))
    assert [path.name for path in tmp_path.iterdir()] == ["auto"]
    written = json.loads((built.path / "spec.json").read_text())
    assert written["passes"] == [SCHEDULER | {"backend": taken}]
