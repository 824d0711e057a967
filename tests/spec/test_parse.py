import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffkiln.errors import SpecError
from diffkiln.spec import Spec, parse_spec
from tests.spec.conftest import EXAMPLE


def reasons(source: Any) -> dict[str, str]:
    with pytest.raises(SpecError) as caught:
        parse_spec(source)
    return {problem.where: f"{problem.reason}. {problem.mend}" for problem in caught.value.problems}


def test_file_path_text_dict_and_spec_read_the_same(example, tmp_path):
    path = tmp_path / "spec.json"
    path.write_text(json.dumps(example), encoding="utf-8")
    spec = parse_spec(example)
    for source in (path, str(path), path.read_bytes(), spec):
        assert parse_spec(source) == spec


def test_does_not_change_the_dict_that_it_reads(example):
    before = json.dumps(example)
    parse_spec(example)
    assert json.dumps(example) == before


def test_json_form_reads_back_equal(example):
    spec = parse_spec(example)
    assert parse_spec(json.dumps(spec.as_json()).encode()) == spec


def test_all_problems_come_together():
    found = reasons(
        {
            "spec_version": 1,
            "source": {"model": "a", "architecture": "b", "dtype": "bf16"},
            "target": [{"device": "cuda", "gpu": "rtx 4091"}, {"device": "cpu", "isa": "avx"}],
            "inputs": {"height": 0, "width": "8", "steps": 3, "guidance_scale": float("inf")},
            "passes": [{"name": "a"}, {"nam": "b"}],
            "runtime": {"offload": {"type": "leaf_level", "stream": True}, "on_incompatible": "eagre"},
            "sourc": {},
        }
    )
    assert set(found) == {
        "$.source",
        "$.source.dtype",
        "$.target[0].gpu",
        "$.target[1].isa",
        "$.inputs.height",
        "$.inputs.width",
        "$.inputs.steps",
        "$.inputs.guidance_scale",
        "$.passes[1].name",
        "$.runtime.offload.type",
        "$.runtime.offload.stream",
        "$.runtime.on_incompatible",
        "$.sourc",
    }
    assert 'Did you mean "nvidia-rtx-4090"?' in found["$.target[0].gpu"]
    assert 'Did you mean "eager"?' in found["$.runtime.on_incompatible"]
    assert 'Did you mean "source"?' in found["$.sourc"]


def test_a_flaw_is_reported_once(example):
    example["inputs"]["height"] = float("nan")
    assert reasons(example) == {"$.inputs.height": "is not a finite number. "}


def test_a_repeated_key_alone_is_an_error(example):
    text = json.dumps(example).replace('"spec_version": 1', '"spec_version": 1, "spec_version": 1')
    assert set(reasons(text.encode())) == {"$"}


@pytest.mark.parametrize("text", [b"[]", b"3", b"null", b'"spec.json"'])
def test_refuses_json_that_is_no_object(text):
    assert "must be an object" in reasons(text)["$"]


def test_refuses_deep_nesting_in_text_and_in_python():
    deep: Any = 1
    for _ in range(100_000):
        deep = {"a": deep}
    assert any("nested" in reason for reason in reasons(deep).values())
    assert "nested" in reasons(b'{"a":' * 100_000)["$"]


def test_a_str_is_a_path():
    assert "as bytes or as a dict" in next(iter(reasons('{"spec_version": 1}').values()))
    assert "no such file" in next(iter(reasons("nowhere.json").values()))
    assert "directory" in next(iter(reasons(Path.cwd()).values()))


def test_checks_targets_of_a_ready_spec(example):
    example["target"]["gpu"] = "nvidia-rtx-9999"
    spec = Spec.model_validate(example)
    assert set(reasons(spec)) == {"$.target.gpu"}


def test_problems_are_numbered_and_bounded(example):
    example |= {f"field{index}": index for index in range(5000)}
    with pytest.raises(SpecError) as caught:
        parse_spec(example)
    assert len(caught.value.problems) < 100
    assert caught.value.exit_code == 2


# A machine that others use too may be slow for a moment; that is no failure.
patient = settings(deadline=None, max_examples=200)

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inside: st.lists(inside, max_size=4) | st.dictionaries(st.text(max_size=8), inside, max_size=4),
    max_leaves=20,
)


def paths_in(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(inner for key, child in items for inner in paths_in(child, (*path, key)))]


def with_value(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    if isinstance(value, dict):
        return {**value, path[0]: with_value(value[path[0]], path[1:], new)}
    return [with_value(item, path[1:], new) if index == path[0] else item for index, item in enumerate(value)]


@patient
@given(st.binary(max_size=200))
def test_bytes_raise_nothing_but_spec_error(text):
    with pytest.raises(SpecError):
        parse_spec(text)


def test_field_named_as_pydantic_marks_keys_is_an_unknown_field():
    with pytest.raises(SpecError, match="there is no such field"):
        parse_spec({"[key]": None})


@patient
@given(json_values)
def test_json_raises_nothing_but_spec_error(value):
    text = json.dumps(value).encode()
    with pytest.raises(SpecError) as caught:
        parse_spec(text)
    str(caught.value).encode()


@patient
@given(st.sampled_from(paths_in(EXAMPLE)), json_values | st.characters(categories=["Cs"]))
def test_example_with_anything_in_one_place_is_read_or_refused(path, new):
    mutated = with_value(EXAMPLE, path, new)
    for source in (mutated, json.dumps(mutated).encode()):
        if isinstance(source, dict | bytes):
            with suppress(SpecError):
                parse_spec(source)


@patient
@given(st.integers(0, 2000), st.binary(max_size=6), st.integers(0, 6))
def test_example_with_bytes_changed_is_read_or_refused(position, new, length):
    text = json.dumps(EXAMPLE).encode()
    position %= len(text)
    with suppress(SpecError):
        parse_spec(text[:position] + new + text[position + length :])


@patient
@given(st.dictionaries(st.text(min_size=1, max_size=8), json_values, max_size=3))
def test_any_option_of_a_pass_that_json_can_say_is_kept(options):
    allowed = {key: value for key, value in options.items() if key not in ("name", "component")}
    example = {**EXAMPLE, "passes": [{"name": "x", **allowed}]}
    with suppress(SpecError):  # NaN, NUL and lone surrogates, which are drawn too
        [entry] = parse_spec(example).passes
        assert json.loads(json.dumps(entry.options)) == json.loads(json.dumps(allowed))
