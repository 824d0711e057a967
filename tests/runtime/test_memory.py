"""A bundle within limits of memory: what it plans is what happens, and the picture stays the same."""

from __future__ import annotations

import contextlib
import json
import re

import pytest
import torch

import diffkiln
from diffkiln.cli import main
from diffkiln.errors import Incompatible, SpecError
from diffkiln.program import CALL, STEP
from diffkiln.program.moments import moments
from diffkiln.program.working import ESTIMATE, WorkingMemory
from diffkiln.runtime.memory import plan_memory
from tests.conftest import DIGITS
from tests.pipelines import WARNING_FILTERS

pytestmark = [pytest.mark.filterwarnings(text) for text in WARNING_FILTERS]

LIMITS = (2_000_000, 2_500_000, 3_000_000, 4_000_000, 5_000_000)


@pytest.fixture(scope="module")
def resident(digits_bundle) -> torch.Tensor:
    with loaded(digits_bundle, 10**9) as pipe:
        assert pipe.executor.store.offload is None
        return drawn(pipe)


def loaded(bundle, limit: int | None = None):
    return diffkiln.load(bundle, max_memory=limit, check_engines=False)


def drawn(pipe, seed: int = 1, **keywords) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return pipe("a handwritten seven", generator=generator, output_type="pt", **keywords).images


def with_observer(pipe, seen) -> None:
    """Has `seen` called with the name of each component before it runs."""

    @contextlib.contextmanager
    def observer(component: str):
        seen(component)
        yield

    pipe.executor.observer = observer


def plan_of(bundle, limit: int | None = None):
    (calls,) = plan_memory(bundle, max_memory=limit).values()
    return calls["call"]


class TestCalls:
    @pytest.mark.parametrize("limit", LIMITS)
    def test_what_is_planned_is_what_happens(self, digits_bundle, resident, limit: int) -> None:
        plan = plan_of(digits_bundle, limit)
        assert plan.residency.peak <= limit
        with loaded(digits_bundle, limit) as pipe:
            store = pipe.executor.store
            for _ in range(2):
                before = store.bytes_brought
                assert torch.equal(drawn(pipe), resident)
                assert store.held() == plan.residency.stays
            assert store.bytes_brought - before == plan.residency.brought
            memory = zip(plan.residency.memory, plan.moments, strict=True)
            assert 0.7 * limit < store.bytes_peak <= max(total - moment.results for total, moment in memory)

    def test_the_more_memory_the_less_comes_in(self, digits_bundle) -> None:
        brought = [plan_of(digits_bundle, limit).residency.brought for limit in (*LIMITS, 10_000_000)]
        assert brought == sorted(brought, reverse=True)
        assert brought[-1] == 0

    def test_an_error_within_a_call_leaves_what_stays_and_nothing_else(self, digits_bundle, resident) -> None:
        plan = plan_of(digits_bundle, 4_000_000)

        def fail(_pipe, step: int, _timestep: float, _given: dict) -> dict:
            if step == 2:
                raise RuntimeError("stop")
            return {}

        with loaded(digits_bundle, 4_000_000) as pipe:
            with pytest.raises(RuntimeError, match="stop"):
                drawn(pipe, callback_on_step_end=fail)
            assert pipe.executor.store.held() <= plan.residency.stays
            assert torch.equal(drawn(pipe), resident)
            assert pipe.executor.store.bytes_peak < 4_000_000

    def test_other_programs_of_a_call_keep_within_the_limit_in_turn(self, digits_bundle, resident) -> None:
        with loaded(digits_bundle, 3_000_000) as pipe:
            latents = torch.randn(1, 16, 8, generator=torch.Generator().manual_seed(3))
            first = drawn(pipe, latents=latents)
            assert torch.equal(drawn(pipe), resident)
            assert torch.equal(drawn(pipe, latents=latents), first)
            assert pipe.executor.store.bytes_peak < 3_000_000

    def test_many_calls_do_not_grow(self, digits_bundle) -> None:
        with loaded(digits_bundle, 4_000_000) as pipe:
            drawn(pipe)
            drawn(pipe)
            store = pipe.executor.store
            peak, held = store.bytes_peak, store.bytes_now
            for seed in range(8):
                drawn(pipe, seed)
            assert (store.bytes_peak, store.bytes_now) == (peak, held)

    def test_a_preview_keeps_within_the_limit(self, digits_bundle, resident) -> None:
        limit, shown = 3_000_000, []

        def show(pipe, step: int, *_: object) -> None:
            shown.append(pipe.preview() if step == 2 else None)

        with loaded(digits_bundle, limit) as pipe:
            assert torch.equal(drawn(pipe, callback_on_step_end=show), resident)
            assert pipe.executor.store.bytes_peak < limit
        assert len([picture for picture in shown if picture is not None]) == 1

    def test_an_interrupted_call_keeps_within_the_limit(self, digits_bundle, resident) -> None:
        """The denoiser's weights, of which some would stay until the next step, make room for the decoder's."""

        def stop(pipe, step: int, *_: object) -> None:
            if step == 1:
                pipe.interrupt()

        limit = plan_of(digits_bundle, LIMITS[0]).residency.peak
        with loaded(digits_bundle, limit) as pipe:
            store, held = pipe.executor.store, []
            with_observer(pipe, lambda component: held.append((component, store.held())))
            drawn(pipe, callback_on_step_end=stop)
            (after,) = [groups for component, groups in held if component == "vae"]
            assert not {key for key in after if key[0] == "transformer"}
            assert torch.equal(drawn(pipe), resident)
            assert store.bytes_peak < limit

    @pytest.mark.parametrize("limit", [None, 4_000_000, 10**9])
    def test_within_a_limit_memory_goes_back_between_components(
        self, digits_bundle, monkeypatch, limit: int | None
    ) -> None:
        returned: list[int] = []
        monkeypatch.setattr("diffkiln.runtime.executor.return_memory", lambda: returned.append(1))
        with loaded(digits_bundle, limit) as pipe:
            drawn(pipe)
            components = {op.attrs["component"] for op in pipe.variants[0].programs["call"].ops if op.name == CALL}
        assert len(returned) == (len(components) if limit else 0)


class TestPlans:
    def test_moments_come_in_the_phases_of_a_call(self, digits_bundle) -> None:
        plan = plan_of(digits_bundle)
        assert [row.phase for row in plan.rows] == ["encode", "denoise", "decode"]
        assert [row.component for row in plan.rows][1:] == ["transformer", "vae"]
        assert {moment.component for moment in plan.moments if moment.phase == "denoise"} <= {"transformer", ""}

    def test_the_groups_come_in_the_order_of_the_executor(self, digits_bundle) -> None:
        with loaded(digits_bundle) as pipe:
            for program in pipe.variants[0].programs.values():
                listed = [moment.enters for moment in moments(program, pipe.executor.groups) if moment.enters]
                assert listed == pipe.executor._call(program).schedule
            assert any(op.name == STEP for op in pipe.variants[0].programs["call"].ops)

    def test_a_large_bundle_that_was_not_measured_has_an_estimate(self, digits_bundle, monkeypatch, capsys) -> None:
        assert plan_of(digits_bundle).working is None
        before = plan_of(digits_bundle).residency.peak
        monkeypatch.setattr("diffkiln.program.working.PLANNED_FROM", 1)
        plan = plan_of(digits_bundle)
        assert plan.working == WorkingMemory(ESTIMATE, measured=False)
        assert plan.residency.peak == before + ESTIMATE
        assert plan.as_json()["working_memory"] == {"bytes": ESTIMATE, "measured": False}
        assert main(["memory", str(digits_bundle)]) == 0
        assert "168 MB of it are working memory, estimated" in capsys.readouterr().out

    def test_a_bundle_without_a_limit_plans_what_its_spec_says(self, digits_bundle) -> None:
        assert plan_of(digits_bundle).residency.strategy == "group"
        assert plan_of(digits_bundle, 10**9).residency.strategy == "resident"


class TestRefusing:
    def test_less_than_any_plan_needs(self, digits_bundle) -> None:
        with pytest.raises(
            Incompatible, match=r"max_memory: found 1,000,000 bytes, required ([\d,]+).*transformer"
        ) as no:
            diffkiln.load(digits_bundle, max_memory="1MB")
        needed = int(str(no.value).partition("required ")[2].split(", for")[0].replace(",", ""))
        assert plan_of(digits_bundle, needed).residency.peak == needed
        with pytest.raises(Incompatible, match="max_memory"):
            plan_memory(digits_bundle, max_memory=needed - 1)

    @pytest.mark.parametrize("amount", ["", "8", "-1GB", "8XB", "0", 0, -5, True, "8 GB of memory", "1e9"])
    def test_what_is_no_amount(self, digits_bundle, amount) -> None:
        if amount == "8":
            with pytest.raises(Incompatible, match="found 8 bytes"):
                diffkiln.load(digits_bundle, max_memory=amount)
            return
        with pytest.raises(SpecError, match=r"max_memory: .*is no amount of memory"):
            diffkiln.load(digits_bundle, max_memory=amount)

    def test_beside_as_diffusers(self, digits_bundle) -> None:
        with pytest.raises(Incompatible, match="max_memory: as_diffusers runs diffusers' own code"):
            diffkiln.load(digits_bundle, as_diffusers=True, max_memory="1GB")


class TestCommand:
    def test_a_table_of_a_bundle(self, digits_bundle, capsys) -> None:
        assert main(["memory", str(digits_bundle), "--max-memory", "4MB"]) == 0
        told = capsys.readouterr().out
        assert "some weights stay in memory, and the others come and go" in told
        assert [line.split()[0] for line in told.splitlines()[1:]] == [
            "phase",
            "encode",
            "denoise",
            "decode",
            *["each"] * 2,
        ]

    def test_a_bundle_as_json(self, digits_bundle, capsys) -> None:
        assert main(["memory", str(digits_bundle), "--json"]) == 0
        (calls,) = json.loads(capsys.readouterr().out).values()
        assert calls["call"]["strategy"] == "group"
        assert {row["phase"] for row in calls["call"]["phases"]} == {"encode", "denoise", "decode"}

    def test_a_spec_says_the_same_before_it_is_built(self, digits_bundle, capsys) -> None:
        peaks = []
        for path in (digits_bundle, DIGITS / "spec.json"):
            assert main(["memory", str(path), "--json"]) == 0
            (calls,) = json.loads(capsys.readouterr().out).values()
            peaks.append(calls["call"]["peak_bytes"])
        assert peaks[1] == pytest.approx(peaks[0], rel=0.01)  # small tables are stored apart

    def test_a_gpu_with_a_name_gets_the_least_time(self, tmp_path, capsys) -> None:
        inputs = {"height": 32, "width": 32, "num_inference_steps": 2, "call": {"max_sequence_length": 16}}
        source = {"model": str(DIGITS / "model")}
        spec = {"spec_version": 1, "source": source, "target": {"device": "cuda", "gpu": "nvidia-l4"}, "inputs": inputs}
        (tmp_path / "spec.json").write_text(json.dumps(spec))
        assert main(["memory", str(tmp_path / "spec.json")]) == 0
        *_, step, least = capsys.readouterr().out.splitlines()
        assert step.startswith("each of 2 steps: ")
        assert re.fullmatch(r"nvidia-l4: at least [\d.e-]+ s, [\d.e-]+ ms for each step", least)

    def test_weights_that_come_over_a_link_are_a_part_of_the_step(self, tmp_path, capsys) -> None:
        spec = {
            "spec_version": 1,
            "source": {"model": str(DIGITS / "model")},
            "target": {"device": "cuda", "gpu": "nvidia-l4"},
            "inputs": {"height": 32, "width": 32, "num_inference_steps": 2, "call": {"max_sequence_length": 16}},
            "runtime": {"offload": {"strategy": "stream"}},
        }
        (tmp_path / "spec.json").write_text(json.dumps(spec))
        assert main(["memory", str(tmp_path / "spec.json")]) == 0
        least = capsys.readouterr().out.splitlines()[-1]
        found = re.search(
            r"([\d.e-]+) ms for each step \(([\d.e-]+) ms of arithmetic and memory, ([\d.e-]+) ms of weights over the "
            r"link, at the same time\)",
            least,
        )
        assert found is not None
        step, computing, coming = map(float, found.groups())
        assert step == max(computing, coming)
        assert main(["memory", str(tmp_path / "spec.json"), "--json"]) == 0
        (calls,) = json.loads(capsys.readouterr().out).values()
        assert calls["call"]["least_seconds"]["nvidia-l4"]["step"] * 1e3 == pytest.approx(step, rel=0.01)

    def test_what_is_not_there(self, capsys) -> None:
        assert main(["memory", "spec.jsn"]) == 2
        assert "there is no bundle and no spec at spec.jsn" in capsys.readouterr().err

    def test_a_wrong_amount(self, digits_bundle, capsys) -> None:
        assert main(["memory", str(digits_bundle), "--max-memory", "much"]) == 2
        assert "'much' is no amount of memory" in capsys.readouterr().err
