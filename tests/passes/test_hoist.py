"""hoist: what it refuses, what it leaves in the loop, its neighbours among the passes, and the bundle."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import diffkiln
from diffkiln.bundle import open_bundle
from diffkiln.compiler.packing import uses_of
from diffkiln.errors import IllegalPlan, Incompatible, PassError
from diffkiln.interpreter.quiet import quiet_libraries
from diffkiln.program.operators import nbytes
from tests.coverage.calls import CALLS
from tests.coverage.calls.measure import drawn
from tests.passes.hoisting.replays import PROMPT, SEED, hoisting, recorded
from tests.pipelines import WARNING_FILTERS

pytestmark = [pytest.mark.filterwarnings(text) for text in WARNING_FILTERS]
HOIST = {"name": "hoist", "component": "transformer"}
#: One step after the other, which gives the very bits.
APART = HOIST | {"batch": False}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return tmp_path_factory.mktemp("hoist")


@pytest.fixture(scope="module")
def flux(folders):
    return recorded("flux", folders)


def _size(types: dict[str, Any]) -> int:
    return sum(map(nbytes, types.values()))


# -- what is refused --


def _refused(made, *passes):
    with pytest.raises(IllegalPlan) as caught:
        diffkiln.check(made.spec | {"passes": list(passes)})
    (problem,) = caught.value.problems
    return problem


def test_what_is_no_denoiser_is_refused(flux):
    assert "not a part of the denoising run" in _refused(flux, HOIST | {"component": "vae"}).reason


def test_a_pattern_that_matches_nothing_is_refused(flux):
    problem = _refused(flux, HOIST | {"keep": ["time_text_embed.*", "time_text"]})
    assert problem.where == "$.passes[0].keep[1]"
    assert 'Did you mean "time_text*"?' in problem.hint


def test_it_stands_before_the_engines_and_after_the_schedule(flux):
    schedule = {"name": "cache_schedule", "component": "transformer", "method": "mask", "steps": [1, 0, 1]}
    assert "cache_schedule must come before hoist" in _refused(flux, HOIST, schedule).reason
    engines = {"name": "compile", "component": "transformer"}
    assert "hoist must come before compile" in _refused(flux, engines, HOIST).reason


def test_nothing_to_compute_ahead_is_an_error(flux):
    with pytest.raises(PassError, match=r"nothing of transformer is computed ahead.*Remove hoist"):
        flux.rewritten(HOIST | {"keep": ["*"]})


# -- what stays --


def test_a_layer_that_is_kept_stays_in_every_block_of_its_class(flux):
    found = flux.rewritten(APART | {"keep": ["transformer_blocks.1.norm1.linear"]})
    loop = dict(found.modules["transformer"].regions["FluxTransformerBlock"].types)
    assert "@norm1.linear.weight" in loop
    assert "@norm1_context.linear.weight" not in loop
    assert torch.equal(flux.draws(found), flux.draws(flux.recording))


def test_blocks_of_a_class_share_one_program(flux):
    module = flux.rewritten(HOIST).modules["transformer"]
    assert {name for name, region in module.regions.items() if not region.ahead} == {
        "FluxTransformerBlock",
        "FluxSingleTransformerBlock",
    }


def test_a_table_that_is_larger_than_its_weights_stays_in_the_loop(folders):
    made = recorded("pixart_sigma", folders, num_inference_steps=20)
    long = made.rewritten(HOIST)
    assert "adaln_single.linear.weight" in long.weight_types()["transformer"]
    assert torch.equal(made.draws(long), made.draws(made.recording))


# -- with other passes --

BESIDE: dict[str, tuple[str, tuple[dict[str, Any], ...], dict[str, Any]]] = {
    "a schedule of blocks": (
        "flux",
        ({"name": "cache_schedule", "component": "transformer", "method": "fora", "interval": 2},),
        {"num_inference_steps": 4},
    ),
    "guidance of some steps": (
        "sd3",
        ({"name": "guidance", "component": "transformer", "batch": "halved", "steps": [1, 1, 0, 1]},),
        {"num_inference_steps": 4},
    ),
    "int8": ("flux", ({"name": "quantize", "component": "transformer", "type": "int8_weight_only"},), {}),
}


@pytest.mark.parametrize("name", BESIDE)
def test_it_changes_no_bit_beside(name, folders):
    family, passes, inputs = BESIDE[name]
    made = recorded(family, folders, *passes, **inputs)
    before, after = made.rewritten(), made.rewritten(*hoisting(made, batch=False))
    assert torch.equal(made.draws(after), made.draws(before))
    assert any(program.ahead for program in after.modules["transformer"].programs.values())


@pytest.mark.parametrize(
    ("entry", "timed"), [(HOIST, ["transformer.timed.3-calls"]), (APART, ["transformer.timed"] * 3)]
)
def test_preambles_are_evaluated_once_for_a_request(flux, entry, timed):
    call = flux.rewritten(entry).calls[0]["call"]
    programs = [op.attrs["program"] for op in call.ops if op.name == "call"]
    own = [name for name in programs if name.startswith("transformer")]
    assert own == ["transformer.preamble", *timed, *["transformer"] * 3]


def test_both_calls_of_a_step_are_in_the_batch(folders):
    halves = {"name": "guidance", "component": "transformer", "batch": "halved"}
    made = recorded("sd3", folders, halves)
    steps = made.spec["inputs"]["num_inference_steps"]
    programs = made.rewritten(HOIST).modules["transformer"].programs
    assert f"transformer.halved.timed.{2 * steps}-calls" in programs


# -- the bundle --


@pytest.fixture(scope="module")
def bundles(flux, tmp_path_factory):
    """A bundle of two variants that streams its blocks, and one that keeps its original weights."""
    root = tmp_path_factory.mktemp("bundles")
    inputs = [flux.spec["inputs"], flux.spec["inputs"] | {"num_inference_steps": 5}]
    offload = {"strategy": "group", "type": "block_level", "num_blocks_per_group": 1, "to": "disk"}
    left = flux.spec | {"passes": [APART], "inputs": inputs, "runtime": {"offload": offload}}
    kept = flux.spec | {"passes": [HOIST | {"keep_originals": True}]}
    return [diffkiln.compile(spec, root / name).path for name, spec in (("left", left), ("kept", kept))]


def test_every_variant_draws_the_same(bundles, flux):
    with diffkiln.load(bundles[0]) as pipe:
        found = drawn(pipe, CALLS["flux"], flux.spec, SEED, PROMPT, like=type(flux.plan.pipe))
        assert torch.equal(found, flux.draws(flux.recording))
        other = flux.spec | {"inputs": flux.spec["inputs"] | {"num_inference_steps": 5}}
        assert drawn(pipe, CALLS["flux"], other, SEED, PROMPT, like=type(flux.plan.pipe)).isfinite().all()


def test_the_bundle_has_the_bytes_that_configuration_foretells(bundles, flux):
    recording = flux.rewritten(HOIST)
    foretold = _size(recording.weight_types()["transformer"])
    with open_bundle(bundles[0]) as bundle:
        rows = bundle.manifest.weights["transformer"]
    assert sum(row.bytes for row in rows) == pytest.approx(foretold, rel=0.01)
    left = uses_of(recording)["transformer"].left_out
    assert left == {name for name in flux.weights["transformer"] if name.startswith("time_text_embed.timestep_")}


def test_what_is_read_before_the_loop_alone_lies_in_files_of_its_own(bundles):
    with open_bundle(bundles[0]) as bundle:
        names = {row.name for row in bundle.manifest.weights["transformer"]}
    assert {"rest.before", "transformer_blocks.0.before", "single_transformer_blocks.1.before"} < names


def test_diffusers_runs_it_if_the_originals_are_kept(bundles, flux):
    with pytest.raises(Incompatible, match='"keep_originals": true in hoist'):
        diffkiln.load(bundles[0], as_diffusers=True)
    with quiet_libraries():
        pipe = diffkiln.load(bundles[1], as_diffusers=True)
    pipe.set_progress_bar_config(disable=True)
    found = drawn(pipe, CALLS["flux"], flux.spec, SEED, PROMPT)
    assert float((found - flux.draws(flux.recording)).abs().max()) <= 1e-4


def test_steps_are_shown_without_the_preambles(bundles):
    from diffkiln.program.schedule import line, schedule
    from diffkiln.runtime.opening import read_modules, read_variant

    with open_bundle(bundles[1]) as bundle, bundle.verify(roles={"program"}) as verified:
        modules = read_modules(verified)
        call = read_variant(verified, 0, modules).programs["call"]
    assert line(schedule(call, modules, "transformer")) == "●●●"
