from typing import Any, ClassVar

import pytest
from pydantic import ValidationError

from diffkiln.spec import Inputs, Offload, PassEntry, Runtime, Source, Spec, TargetSpec, problems_from


def complaints(model: Any, /, **fields: Any) -> dict[str, str]:
    with pytest.raises(ValidationError) as caught:
        model.model_validate(fields)
    return {problem.where: problem.reason for problem in problems_from(caught.value, model)}


def test_reads_the_example_of_the_documentation(example):
    spec = Spec.model_validate(example)
    assert spec.variants == (spec.inputs,)
    assert spec.targets == (spec.target,)
    assert [entry.name for entry in spec.passes] == ["fuse_qkv", "quantize", "cache_schedule", "compile"]
    assert spec.runtime.offload == Offload()


def test_one_and_many_read_the_same(example):
    one = Spec.model_validate(example)
    many = Spec.model_validate({**example, "target": [example["target"]], "inputs": [example["inputs"]]})
    assert many.targets == one.targets
    assert many.variants == one.variants


def test_only_source_target_and_inputs_are_needed(example):
    spec = Spec.model_validate({key: example[key] for key in ("spec_version", "source", "target", "inputs")})
    assert spec.passes == ()
    assert spec.runtime == Runtime(offload=None, on_incompatible="error", on_unrecordable="error")


def test_json_form_writes_defaults_out_and_reads_back_equal(example):
    spec = Spec.model_validate(example)
    written = spec.as_json()
    assert written["inputs"]["num_images_per_prompt"] == 1
    assert "num_frames" not in written["inputs"]
    assert Spec.model_validate(written) == spec


def test_json_form_keeps_nulls_that_the_user_wrote(example):
    example["inputs"]["call"]["negative_prompt"] = None
    example["passes"] = [{"name": "compile", "scope": None}]
    written = Spec.model_validate(example).as_json()
    assert written["inputs"]["call"]["negative_prompt"] is None
    assert written["passes"] == [{"name": "compile", "scope": None}]


def test_models_are_frozen(example):
    spec = Spec.model_validate(example)
    with pytest.raises(ValidationError, match="frozen"):
        spec.source = Source(model="other")  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("value", ["1024", 1024.0, True, 0, -1, 65_537, pytest.param(10**5000, id="huge")])
def test_rejects_height_that_is_not_a_plausible_whole_number(value):
    assert "$.height" in complaints(Inputs, height=value, width=8, num_inference_steps=1)


@pytest.mark.parametrize("listed", ["target", "inputs"])
def test_rejects_empty_and_repeated_lists(example, listed):
    assert "1 to" in complaints(Spec, **{**example, listed: []})[f"$.{listed}"]
    assert "repeats" in complaints(Spec, **{**example, listed: [example[listed]] * 2})[f"$.{listed}"]


class TestSource:
    def test_is_a_model_or_an_architecture(self):
        Source(model="dir", revision="main", dtype="float16")
        Source(architecture="flux.1-dev", seed=0)

    def test_rejects_both_and_neither(self):
        assert "both" in complaints(Source, model="a", architecture="b", seed=0)["$"]
        assert "neither" in complaints(Source)["$"]

    def test_rejects_fields_of_the_other_kind(self):
        assert set(complaints(Source, model="a", seed=1)) == {"$.seed"}
        assert set(complaints(Source, architecture="a")) == {"$.seed"}
        assert set(complaints(Source, architecture="a", seed=1, revision="b")) == {"$.revision"}

    def test_reports_conflicts_together_with_bad_fields(self):
        found = complaints(Source, model="a", architecture="b", seed=-1, dtype="bf16")
        assert set(found) == {"$", "$.seed", "$.dtype"}


class TestTarget:
    numbers: ClassVar = {"compute_capability": "8.9", "memory_gb": 24, "h2d_gb_per_s": 25}

    def test_takes_a_name_or_numbers_or_a_cpu(self):
        TargetSpec(device="cuda", gpu="nvidia-l4", driver="570.26", cuda="12.8")
        TargetSpec(device="cuda", **self.numbers)
        assert TargetSpec(device="cpu").isa == "x86-64-v3"

    def test_rejects_a_name_with_numbers(self):
        assert set(complaints(TargetSpec, device="cuda", gpu="nvidia-l4", memory_gb=3)) == {"$.memory_gb"}

    def test_asks_for_the_numbers_that_are_missing(self):
        found = complaints(TargetSpec, device="cuda", compute_capability="8.9")
        assert set(found) == {"$.memory_gb", "$.h2d_gb_per_s"}

    def test_asks_for_a_gpu(self):
        assert complaints(TargetSpec, device="cuda") == {"$": "does not say which GPU"}

    def test_rejects_gpu_fields_for_a_cpu(self):
        assert set(complaints(TargetSpec, device="cpu", gpu="nvidia-l4", cuda="12.8")) == {"$.gpu", "$.cuda"}

    @pytest.mark.parametrize("value", ["sm_89", "8", "8.9a", "8,9", 8.9, "٨.٩"])
    def test_rejects_other_forms_of_compute_capability(self, value):
        found = complaints(TargetSpec, device="cuda", **{**self.numbers, "compute_capability": value})
        assert set(found) == {"$.compute_capability"}


class TestInputs:
    def test_freezes_the_call(self):
        inputs = Inputs(height=8, width=8, num_inference_steps=1, call={"sigmas": [1.0, 0.5], "nested": {"a": [1]}})
        assert inputs.call == {"sigmas": (1.0, 0.5), "nested": {"a": (1,)}}

    def test_unknown_keyword_is_sent_to_call(self):
        with pytest.raises(ValidationError) as caught:
            Inputs.model_validate({"height": 8, "width": 8, "num_inference_steps": 1, "max_sequence_length": 3})
        [problem] = problems_from(caught.value, Inputs)
        assert '"call"' in problem.hint

    def test_rejects_own_fields_in_call(self):
        found = complaints(Inputs, height=8, width=8, num_inference_steps=1, call={"height": 9})
        assert set(found) == {"$.call.height"}

    @pytest.mark.parametrize("value", [float("nan"), object(), {3: 4}, b"x", {"a": {1, 2}}])
    def test_rejects_what_json_cannot_say(self, value):
        assert "$.call.x" in complaints(Inputs, height=8, width=8, num_inference_steps=1, call={"x": value})


class TestPassEntry:
    def test_options_are_all_but_the_name(self):
        entry = PassEntry.model_validate({"name": "quantize", "component": "vae", "exclude": ["*norm*"], "group": None})
        assert entry.options == {"component": "vae", "exclude": ("*norm*",), "group": None}

    def test_options_have_no_component_that_was_not_given(self):
        assert PassEntry(name="compile").options == {}

    def test_options_may_have_any_name(self):
        extra = {"options": 1, "model_dump": 2, "__class__": 3, "__init__": 4}
        entry = PassEntry.model_validate({"name": "x", **extra})
        assert type(entry) is PassEntry
        assert entry.options == extra

    def test_changing_the_options_does_not_change_the_entry(self):
        entry = PassEntry.model_validate({"name": "x", "a": 1})
        entry.options["a"] = 2
        assert entry.options == {"a": 1}


class TestOffload:
    def test_leaf_level_is_refused_with_the_reason(self):
        found = complaints(Offload, strategy="group", type="leaf_level")
        assert "never fire" in found["$.type"]

    @pytest.mark.parametrize("field", [{"num_blocks_per_group": 0}, {"use_stream": 1}, {"to": "cloud"}])
    def test_rejects_bad_values(self, field):
        assert set(complaints(Offload, **field)) == {f"$.{next(iter(field))}"}


def test_a_limit_of_memory_is_read_in_bytes() -> None:
    for written, size in (("8GiB", 8 * 2**30), ("1.5 GB", 1_500_000_000), (1000, 1000), ("512mib", 2**29)):
        offload = Offload.model_validate({"strategy": "auto", "max_memory": written})
        assert offload.max_memory == size
        assert Offload.model_validate(offload.model_dump(mode="json")) == offload


@pytest.mark.parametrize("written", ["much", "0", 0, -1, "8XB", "-8GB"])
def test_what_is_no_amount_of_memory(written) -> None:
    found = complaints(Offload, strategy="auto", max_memory=written)
    assert list(found) == ["$.max_memory"]


def test_a_limit_belongs_to_auto() -> None:
    assert complaints(Offload, max_memory="8GiB") == {
        "$.max_memory": "is a limit for the strategies auto and stream, and group keeps none"
    }
