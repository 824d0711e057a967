"""Caching schedules on the digits pipeline: replayed and compiled, resident and offloaded, and with no leaked state."""

from __future__ import annotations

import json
import threading
from typing import Any

import pytest
import torch

import diffkiln
from diffkiln.errors import Busy
from diffkiln.interpreter.quiet import quiet_libraries
from diffkiln.passes.caching import every, magnitude
from tests.conftest import DIGITS
from tests.exporters.regions import engine_cache
from tests.passes.caching import definitions
from tests.passes.caching.definitions import Run
from tests.passes.test_cache_schedule import METHODS as FAMILY_METHODS
from tests.passes.test_cache_schedule import draw as draw_family
from tests.passes.test_cache_schedule import eager as eager_of
from tests.passes.test_cache_schedule import spec as spec_of_method
from tests.pipelines import WARNING_FILTERS

pytestmark = [pytest.mark.filterwarnings(text) for text in WARNING_FILTERS]
STEPS = 8
RATIOS = [1.0, 1.01, 1.01, 1.02, 0.98, 0.97, 0.97, 0.95]
MASK = every(STEPS, 2)
#: The same in engines as another method here; tests/passes/test_cache_schedule.py replays each.
LONG = ("magcache", "taylorseer")
#: name → options, the definition
METHODS: dict[str, tuple[dict[str, Any], Any]] = {
    "mask": (
        {"method": "mask", "steps": [1, 0, 1, 0, 1, 0, 1, 0]},
        lambda net: definitions.output(Run(net, MASK)),
    ),
    "fora": ({"method": "fora", "interval": 2}, lambda net: definitions.blocks(Run(net, MASK))),
    "first_block": ({"method": "first_block", "interval": 2}, lambda net: definitions.blocks(Run(net, MASK), 1)),
    "dbcache": (
        {"method": "dbcache", "interval": 2, "front": 1, "back": 1},
        lambda net: definitions.blocks(Run(net, MASK), 1, 1),
    ),
    "taylorseer": (
        {"method": "taylorseer", "interval": 2, "order": 2},
        lambda net: definitions.output(Run(net, MASK), 2),
    ),
    "magcache": (
        {"method": "magcache", "ratios": RATIOS, "threshold": 0.06},
        lambda net: definitions.blocks(Run(net, magnitude(RATIOS, 0.06, 3, 0.2))),
    ),
}
OFFLOAD = {"strategy": "group", "type": "block_level", "num_blocks_per_group": 1, "use_stream": False}
GIVEN = {"height": 32, "width": 32, "num_inference_steps": STEPS, "guidance_scale": 1.0, "max_sequence_length": 16}


def build(root, name: str, options: dict[str, Any], compiled: bool, offload: bool, **more: Any):
    spec = json.loads((DIGITS / "spec.json").read_text()) | more
    spec["passes"] = [{"name": "fuse_qkv", "component": "transformer"}]
    spec["passes"] += [{"name": "cache_schedule", "component": "transformer", **options}] if options else []
    spec["passes"] += [{"name": "compile", "component": "transformer"}] if compiled else []
    spec["runtime"] = {"offload": OFFLOAD} if offload else {}
    return diffkiln.compile(spec, root / name, base=DIGITS, cache=engine_cache()).path


def draw(pipe: Any, **more: Any) -> torch.Tensor:
    given = GIVEN | more
    return pipe("a seven", generator=torch.Generator().manual_seed(3), output_type="pt", **given).images


@pytest.fixture(scope="module")
def eager():
    from diffusers import DiffusionPipeline

    with quiet_libraries():
        pipe = DiffusionPipeline.from_pretrained(DIGITS / "model")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.long) if name in LONG else name for name in METHODS]
)
def test_a_method_is_its_definition_replayed_compiled_resident_and_offloaded(name, eager, tmp_path):
    options, definition = METHODS[name]
    with definition(eager.transformer):
        wanted = draw(eager)
    for compiled in (False, True):
        for offload in (False, True):
            with diffkiln.load(build(tmp_path, f"{compiled}-{offload}", options, compiled, offload)) as pipe:
                assert float((draw(pipe) - wanted).abs().max()) <= 1e-4, (compiled, offload)


@pytest.mark.parametrize("name", ["deepcache", "fora of a video"])
def test_unets_and_videos_are_their_definition_compiled_and_offloaded(name, families, tmp_path):
    family, component, options, definition, _ = FAMILY_METHODS[name]
    made = spec_of_method(families, family, component, **options) | {"runtime": {"offload": OFFLOAD}}
    made["passes"].append({"name": "compile", "component": component})
    built = diffkiln.compile(made, tmp_path / "bundle", cache=engine_cache())
    pipe = eager_of(made)
    with definition(getattr(pipe, component)):
        wanted = draw_family(pipe, made)
    with diffkiln.load(built.path) as compiled:
        assert {part for part, _ in compiled.executor.engines} == {component}
        found = draw_family(compiled, made)
        peak = compiled.executor.store.groups_peak
        assert peak < len(compiled.executor.store.groups)
    assert float((found - wanted).abs().max()) <= 1e-4


def brought(root, name: str, options: dict[str, Any]) -> int:
    """How many groups of weights of the transformer one call brings in."""
    with diffkiln.load(build(root, name, options, False, True)) as pipe:
        store = pipe.executor.store
        counted: list[Any] = []
        bring = store._bring

        def counting(key: Any) -> Any:
            counted.append(key)
            return bring(key)

        store._bring = counting
        draw(pipe)
        return sum(component == "transformer" for component, _ in counted)


def test_a_step_that_reuses_moves_no_weights(tmp_path):
    """Four blocks and the rest of the transformer: what every step moves beyond what stays is counted."""
    whole = brought(tmp_path, "all", {})
    half = brought(tmp_path, "mask", METHODS["mask"][0])
    fora = brought(tmp_path, "fora", METHODS["fora"][0])
    first = brought(tmp_path, "first", METHODS["first_block"][0])
    blocks = 4
    assert whole - half == whole - fora == 4 * blocks
    assert first == fora + 4


def test_variants_and_callers_latents_keep_their_own_state(tmp_path, eager):
    variants = [json.loads((DIGITS / "spec.json").read_text())["inputs"] | {"num_inference_steps": n} for n in (8, 4)]
    bundle = build(tmp_path, "two", METHODS["fora"][0], False, False, inputs=variants)
    with diffkiln.load(bundle) as pipe:
        first = draw(pipe)
        with definitions.blocks(Run(eager.transformer, every(4, 2))):
            wanted = draw(eager, num_inference_steps=4)
        assert float((draw(pipe, num_inference_steps=4) - wanted).abs().max()) <= 1e-4
        latents = torch.randn(1, 16, 8, generator=torch.Generator().manual_seed(1))
        with definitions.blocks(Run(eager.transformer, MASK)):
            wanted = draw(eager, latents=latents)
        assert float((draw(pipe, latents=latents) - wanted).abs().max()) <= 1e-4
        assert torch.equal(draw(pipe), first)


class Stop(Exception):
    """Raised in the middle of a call."""


def test_an_interrupted_call_leaves_nothing_behind(tmp_path):
    bundle = build(tmp_path, "bundle", METHODS["taylorseer"][0], False, True)

    def stop(_pipe: Any, step: int, _timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if step == 4:
            raise Stop
        return values

    with diffkiln.load(bundle) as pipe, diffkiln.load(bundle) as other:
        wanted = draw(other)
        with pytest.raises(Stop):
            draw(pipe, callback_on_step_end=stop)
        assert torch.equal(draw(pipe), wanted)
        assert torch.equal(draw(other), wanted)


def test_a_thread_that_waits_too_long_is_refused_and_leaves_the_pipeline_whole(tmp_path):
    with diffkiln.load(build(tmp_path, "bundle", METHODS["fora"][0], False, False)) as pipe:
        wanted = draw(pipe)
        inside, done = threading.Event(), threading.Event()
        refused: list[BaseException] = []

        def wait(_pipe: Any, _step: int, _timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
            inside.set()
            assert done.wait(60)
            return values

        def second() -> None:
            inside.wait(60)
            try:
                draw(pipe, timeout=0.05)
            except Busy as error:
                refused.append(error)
            finally:
                done.set()

        thread = threading.Thread(target=second)
        thread.start()
        found = draw(pipe, callback_on_step_end=wait)
        thread.join()
        assert "other threads" in str(refused[0])
        assert torch.equal(found, wanted)
        assert torch.equal(draw(pipe), wanted)
