"""CUDA graphs as far as no GPU is needed: what is refused, how a call is cut, and that each value has one place."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import diffkiln
from diffkiln.bundle import Manifest
from diffkiln.errors import CallError, IllegalPlan, Incompatible, OutOfMemory, SpecError
from diffkiln.program import NOISE, STEP, map_refs
from diffkiln.runtime.graphs import STEPWISE, WHOLE, Graphs, check_addresses, cut, graphs_for
from diffkiln.runtime.streaming import Tensors
from tests.conftest import DIGITS
from tests.end_to_end.test_families import spec_of
from tests.pipelines import WARNING_FILTERS

pytestmark = [pytest.mark.filterwarnings(text) for text in WARNING_FILTERS]
GPU = {"device": "cuda", "gpu": "nvidia-l4"}
DIGIT = {
    "spec_version": 1,
    "source": {"model": "model"},
    "target": GPU,
    "inputs": {"height": 32, "width": 32, "num_inference_steps": 8},
    "runtime": {"cuda_graphs": "step"},
}


class PythonGraph:
    """The test's own stand-in for a CUDA graph: it launches again by calling the function again, and writes the results
    to where they were the first time, as a graph would."""

    def __init__(self) -> None:
        self.recorded = self.launched = 0

    def __call__(self, run: Callable[[], Tensors], ready: Callable[[], None]) -> tuple[Callable[[], object], Tensors]:
        self.recorded += 1
        ready()
        places = [tensor.clone() for tensor in run()]

        def launch() -> None:
            self.launched += 1
            for place, tensor in zip(places, run(), strict=True):
                place.copy_(tensor)

        for place in places:
            place.fill_(0)  # a recording computes nothing
        return launch, places


@pytest.fixture(scope="module")
def bundle(families, tmp_path_factory) -> Path:
    """Without engines, so that a CPU runs it too."""
    made = spec_of("sd", families) | {"target": GPU, "runtime": {"cuda_graphs": "program"}}
    return diffkiln.compile(made, tmp_path_factory.mktemp("graphs") / "bundle").path


@pytest.fixture(scope="module")
def loaded(bundle) -> Iterator:
    with diffkiln.load(bundle, device="cpu") as loaded:
        yield loaded


@pytest.fixture
def pipe(loaded) -> Iterator:
    yield loaded
    loaded.executor.graphs = None


def steps_of(pipe) -> int:
    return sum(op.name == STEP for op in pipe.variants[0].programs["call"].ops)


def recording(pipe, unit: str) -> PythonGraph:
    """Have a pipeline on the CPU run by the stand-in."""
    graph = PythonGraph()
    pipe.executor.graphs = Graphs(unit, torch.device("cpu"), graph)
    return graph


def draw(pipe, prompt: str = "a red fox", seed: int = 5, **keywords) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return pipe(prompt, generator=generator, **{"output_type": "pt"} | keywords).images


# -- what a spec may ask for --


def test_a_cpu_has_no_graphs() -> None:
    with pytest.raises(IllegalPlan, match=r"\$\.runtime\.cuda_graphs: .*a CPU has none.*Remove it"):
        diffkiln.check(DIGIT | {"target": {"device": "cpu"}}, base=DIGITS)
    assert diffkiln.check(DIGIT, base=DIGITS).spec.runtime.cuda_graphs == "step"


def test_graphs_and_offloading_exclude_each_other() -> None:
    with pytest.raises(SpecError, match=r'\$\.runtime\.cuda_graphs: a graph holds the addresses.*remove "offload"'):
        diffkiln.check(DIGIT | {"runtime": {"cuda_graphs": "program", "offload": {}}}, base=DIGITS)


def test_graphs_hold_copies_of_weights_that_stream_from_the_host() -> None:
    def checked(**offload: str) -> object:
        return diffkiln.check(DIGIT | {"runtime": {"cuda_graphs": "step", "offload": offload}}, base=DIGITS)

    assert checked(strategy="stream")
    with pytest.raises(SpecError, match=r"\$\.runtime\.cuda_graphs: a graph copies weights from the host's memory"):
        checked(strategy="stream", to="disk")


def test_a_word_that_means_no_graph_is_told_the_words() -> None:
    with pytest.raises(SpecError, match=r'\$\.runtime\.cuda_graphs: "steps" is not one of "step", "program"'):
        diffkiln.check(DIGIT | {"runtime": {"cuda_graphs": "steps"}}, base=DIGITS)


def test_engines_that_wait_for_the_gpu_are_refused() -> None:
    passes = [{"name": "compile", "component": "unet", "backend": "onnx"}]
    with pytest.raises(IllegalPlan, match=r"\$\.passes\[0\]\.backend: ONNX Runtime waits.*cuda_graphs"):
        diffkiln.check(DIGIT | {"passes": passes}, base=DIGITS)


def test_the_manifest_says_it_and_inspect_shows_it(bundle, loaded, capsys) -> None:
    from diffkiln.cli import main

    assert main(["inspect", str(bundle)]) == 0
    assert "cuda_graphs program" in capsys.readouterr().out.replace("=", " ").replace(": ", " ")
    assert loaded.executor.graphs is None


def test_a_load_on_a_cpu_says_that_it_makes_none(caplog) -> None:
    assert graphs_for(_manifest(cuda_graphs="step"), torch.device("cpu")) is None
    assert "no CUDA graphs: the bundle asks for them, and runs on cpu" in caplog.text
    found = graphs_for(_manifest(cuda_graphs="step"), torch.device("cuda"))
    assert found is not None
    assert found.unit == STEPWISE


def test_a_manifest_that_asks_for_both_is_refused() -> None:
    graphs = graphs_for(_manifest(cuda_graphs="step", offload={}), torch.device("cuda"))
    with pytest.raises(Incompatible, match="cuda_graphs: found weights that are offloaded, required"):
        check_addresses(graphs, {})
    with pytest.raises(Incompatible, match="cuda_graphs"):
        check_addresses(graphs, {"strategy": "stream", "to": "disk"})
    check_addresses(graphs, {"strategy": "stream"})
    check_addresses(graphs, None)
    check_addresses(None, {})


def _manifest(**runtime) -> Manifest:
    return Manifest.model_construct(runtime={"device": "cuda", **runtime})


# -- how a call is cut --


@pytest.mark.parametrize("unit", [STEPWISE, WHOLE])
def test_noise_and_the_ends_of_steps_are_the_hosts(pipe, unit) -> None:
    call = pipe.variants[0].programs["call"]
    ends = steps_of(pipe) if unit == STEPWISE else 1
    pieces = cut(call, unit)
    hosts = [piece.program.ops[0].name for piece in pieces if piece.host]
    assert hosts == [NOISE] + [STEP] * ends
    assert all(len(piece.program.ops) == 1 for piece in pieces if piece.host)
    assert [op for piece in pieces for op in piece.program.ops] == list(call.ops)
    assert not any(op.name == NOISE for piece in pieces if not piece.host for op in piece.program.ops)


def test_a_piece_takes_what_it_reads_and_gives_what_is_read_later(pipe) -> None:
    call = pipe.variants[0].programs["call"]
    known = {item.name for item in call.inputs}
    for piece in cut(call, STEPWISE):
        assert {item.name for item in piece.program.inputs} <= known
        known |= {ref.name for ref in piece.program.outputs}
    assert {ref.name for ref in call.outputs} <= known


def test_a_call_without_steps_is_cut_at_its_noise_alone(pipe) -> None:
    call = pipe.variants[0].programs["call"]
    ends = {op.outputs[0]: op.args[0] for op in call.ops if op.name == STEP}

    def before(ref):
        return before(ends[ref.name]) if ref.name in ends else ref

    ops = tuple(replace(op, args=map_refs(op.args, before)) for op in call.ops if op.name != STEP)
    plain = replace(call, ops=ops)
    assert [piece.host for piece in cut(plain, STEPWISE)] == [piece.host for piece in cut(plain, WHOLE)]
    assert len(cut(plain, STEPWISE)) == 3


# -- running --


@pytest.mark.parametrize("unit", [STEPWISE, WHOLE])
def test_it_draws_what_is_drawn_without_graphs(pipe, unit) -> None:
    graphs = 2 + (steps_of(pipe) if unit == STEPWISE else 1)
    requests = [("a red fox", 5), ("two blue birds on a wire", 6)]
    wanted = [draw(pipe, *request) for request in requests]
    graph = recording(pipe, unit)
    found = [draw(pipe, *request) for request in requests]  # all kept: no later call may write into an earlier result
    assert graph.recorded == graphs
    assert graph.launched == 2 * graphs
    for want, got in zip(wanted, found, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_numbers_that_a_caller_gives_are_a_part_of_what_is_recorded(pipe) -> None:
    scales = (3.0, 7.0, 3.0)
    wanted = [draw(pipe, guidance_scale=scale) for scale in scales]
    graph = recording(pipe, WHOLE)
    found = [draw(pipe, guidance_scale=scale) for scale in scales]
    assert graph.recorded == 6
    for want, got in zip(wanted, found, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_graphs_of_numbers_that_were_not_used_for_long_are_let_go(pipe) -> None:
    graph = recording(pipe, WHOLE)
    for scale in (2.0, 3.0, 4.0, 5.0, 2.0, 6.0):  # of which 3.0 was used longest ago
        draw(pipe, guidance_scale=scale)
    assert graph.recorded == 3 * 5
    draw(pipe, guidance_scale=2.0)
    assert graph.recorded == 3 * 5
    draw(pipe, guidance_scale=3.0)
    assert graph.recorded == 3 * 6


def test_latents_that_are_asked_for_are_the_callers_own(pipe) -> None:
    wanted = draw(pipe, output_type="latent").clone()
    recording(pipe, WHOLE)
    first = draw(pipe, output_type="latent")
    draw(pipe, "another", 9, output_type="latent")
    torch.testing.assert_close(first, wanted, rtol=0, atol=0)


def test_a_callback_sees_every_step_and_may_change_it(pipe) -> None:
    def halve(pipeline, step, timestep, tensors):
        seen.append(tensors["latents"])
        return {"latents": tensors["latents"] * 0.5}

    seen: list[torch.Tensor] = []
    wanted = draw(pipe, callback_on_step_end=halve)
    recording(pipe, STEPWISE)
    found = draw(pipe, callback_on_step_end=halve)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    half = steps_of(pipe)
    for want, got in zip(seen[:half], seen[half:], strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_a_callback_within_one_graph_is_refused_before_anything_runs(pipe) -> None:
    graph = recording(pipe, WHOLE)
    with pytest.raises(CallError, match=r'callback_on_step_end: all steps are one CUDA graph.*"cuda_graphs": "step"'):
        draw(pipe, callback_on_step_end=lambda *_: {})
    assert graph.recorded == 0


def test_what_cannot_be_recorded_names_the_call_and_the_mend(pipe) -> None:
    def fails(run, ready):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    pipe.executor.graphs = Graphs(WHOLE, torch.device("cpu"), fails)
    with pytest.raises(Incompatible, match=r"recorded in a CUDA graph: operation not .* capturing\. Compile without"):
        draw(pipe)
    recording(pipe, WHOLE)
    assert draw(pipe).isfinite().all()


@contextmanager
def recording_that_ends_badly() -> Iterator[None]:
    """As torch's does: where what is recorded fails, its end fails too, with words of its own."""
    try:
        yield
    finally:
        raise RuntimeError("CUDA error: operation failed due to a previous error during capture")


@pytest.mark.parametrize(
    ("cause", "told"),
    [
        (
            RuntimeError("CUDA error: operation not permitted"),
            (Incompatible, "CUDA graph: CUDA error: operation not p"),
        ),
        (torch.OutOfMemoryError("CUDA out of memory"), (OutOfMemory, "CUDA out of memory")),
    ],
)
def test_the_first_of_several_errors_is_told(pipe, cause, told) -> None:
    def fails(run, ready):
        with recording_that_ends_badly():
            raise cause

    pipe.executor.graphs = Graphs(WHOLE, torch.device("cpu"), fails)
    with pytest.raises(told[0], match=told[1]):
        draw(pipe)


def test_what_was_recorded_is_let_go(pipe) -> None:
    recording(pipe, WHOLE)
    draw(pipe)
    held = weakref.ref(next(iter(pipe.executor.graphs._calls.values())))
    pipe.executor.graphs.close()
    assert held() is None


@pytest.mark.parametrize("first", [True, False])
def test_interrupting_skips_pieces_as_it_skips_operations(pipe, first) -> None:
    def stop(which, step, _timestep, values):
        which._interrupt = step == 0
        return values

    want = draw(pipe, callback_on_step_end=stop)
    whole = draw(pipe)
    recording(pipe, STEPWISE)
    if not first:
        assert torch.equal(draw(pipe), whole)
    assert torch.equal(draw(pipe, callback_on_step_end=stop), want)
    assert torch.equal(draw(pipe, callback_on_step_end=stop, output_type="latent"), draw_latents(pipe, stop))
    assert torch.equal(draw(pipe), whole)


@pytest.mark.parametrize("first", [True, False])
def test_a_preview_is_launched_and_leaves_the_call_as_it_is(pipe, first) -> None:
    def look(which, _step, _timestep, _values):
        seen.append(which.preview("pt").images)

    seen: list[torch.Tensor] = []
    want = draw(pipe, callback_on_step_end=look)
    recording(pipe, STEPWISE)
    if not first:
        draw(pipe)
    assert torch.equal(draw(pipe, callback_on_step_end=look), want)
    assert torch.equal(draw(pipe), want)
    half = steps_of(pipe)
    for before, launched in zip(seen[:half], seen[half:], strict=True):
        assert torch.equal(before, launched)


def draw_latents(pipe, stop) -> torch.Tensor:
    graphs, pipe.executor.graphs = pipe.executor.graphs, None
    try:
        return draw(pipe, callback_on_step_end=stop, output_type="latent")
    finally:
        pipe.executor.graphs = graphs
