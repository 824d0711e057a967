import json
import re
from typing import Any, Literal

import pytest
from pydantic import Field

from diffkiln.spec import GPUS, Spec, Strict, json_schema
from tests.spec.conftest import EXAMPLE


class Filter(Strict):
    pattern: str


class FuseQkv(Strict):
    """Fuses the projections of query, key and value."""

    component: str = Field(description="The component to work on.")


class Quantize(Strict):
    """Quantizes weights."""

    component: str
    backend: Literal["torchao", "bitsandbytes"]
    type: str = "int8_weight_only"
    exclude: tuple[str, ...] = ()
    filters: tuple[Filter, ...] = ()


class CacheSchedule(Strict):
    component: str
    method: Literal["fora"]
    interval: int = 2


class Compile(Strict):
    component: str
    backend: str
    scope: Literal["blocks", "whole"] | None = None


OPTIONS = {"fuse_qkv": FuseQkv, "quantize": Quantize, "cache_schedule": CacheSchedule, "compile": Compile}


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    return json_schema(OPTIONS)


def fits(value: Any, schema: dict[str, Any] | bool, root: dict[str, Any]) -> bool:
    """Whether `value` fits, for the part of JSON Schema that is used here."""
    if isinstance(schema, bool):
        return schema
    if "$ref" in schema and not fits(value, root["$defs"][schema["$ref"].rsplit("/", 1)[1]], root):
        return False
    if "const" in schema and value != schema["const"]:
        return False
    if "enum" in schema and value not in schema["enum"]:
        return False
    if "anyOf" in schema and not any(fits(value, option, root) for option in schema["anyOf"]):
        return False
    if "oneOf" in schema and sum(fits(value, option, root) for option in schema["oneOf"]) != 1:
        return False
    if "pattern" in schema and isinstance(value, str) and not re.search(schema["pattern"], value):
        return False
    kinds = {"object": dict, "array": list, "string": str, "integer": int, "boolean": bool, "null": type(None)}
    kinds["number"] = (int, float)
    if "type" in schema and not isinstance(value, kinds[schema["type"]]):
        return False
    if isinstance(value, int) and not schema.get("minimum", value) <= value <= schema.get("maximum", value):
        return False
    if isinstance(value, dict):
        return _object_fits(value, schema, root)
    if isinstance(value, list):
        return all(fits(item, schema.get("items", {}), root) for item in value)
    return True


def _object_fits(value: dict[str, Any], schema: dict[str, Any], root: dict[str, Any]) -> bool:
    known, others = schema.get("properties", {}), schema.get("additionalProperties", True)
    return all(name in value for name in schema.get("required", ())) and all(
        fits(item, known.get(key, others), root) for key, item in value.items()
    )


def test_is_a_2020_12_schema_that_json_can_say(schema):
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert schema["$id"]
    assert json.loads(json.dumps(schema)) == schema
    fields = {"$schema", "spec_version", "source", "target", "inputs", "passes", "quality", "runtime"}
    assert fields == set(schema["properties"])


def test_the_example_fits(schema):
    assert fits(EXAMPLE, schema, schema)


def test_what_the_models_write_fits(schema):
    assert fits(Spec.model_validate(EXAMPLE).as_json(), schema, schema)


@pytest.mark.parametrize(
    "change",
    [
        {"passes": [{"name": "fuse_qvk", "component": "transformer"}]},
        {"passes": [{"name": "fuse_qkv", "component": "transformer", "backend": "torchao"}]},
        {"passes": [{"name": "fuse_qkv"}]},
        {"passes": [{"component": "transformer"}]},
        {"source": {"model": "a", "architecture": "b", "seed": 0}},
        {"source": {}},
        {"target": {"device": "cuda"}},
        {"target": {"device": "cuda", "compute_capability": "8.9"}},
        {"inputs": {"height": 0}},
        {"runtime": {"offload": {"type": "leaf_level"}}},
        {"extra": 1},
    ],
)
def test_what_the_models_refuse_does_not_fit(schema, change):
    assert not fits({**EXAMPLE, **change}, schema, schema)


def test_a_pass_is_described_from_its_options_model(schema):
    entries = {entry["properties"]["name"]["const"]: entry for entry in schema["$defs"]["PassEntry"]["oneOf"]}
    assert set(entries) == set(OPTIONS)
    fuse = entries["fuse_qkv"]
    assert fuse["title"] == "fuse_qkv"
    assert fuse["description"] == "Fuses the projections of query, key and value."
    assert fuse["required"] == ["name", "component"]
    assert fuse["additionalProperties"] is False
    assert fuse["properties"]["component"]["description"] == "The component to work on."
    assert entries["cache_schedule"]["properties"]["interval"]["default"] == 2


def test_every_reference_is_defined_and_every_definition_is_used(schema):
    references = set(re.findall(r'"#/\$defs/([^"]+)"', json.dumps(schema)))
    assert references == set(schema["$defs"])
    assert "Filter" in references


def test_every_field_of_the_spec_has_a_description(schema):
    for name in ("Source", "TargetSpec", "Inputs", "Runtime", "Offload"):
        for field, described in schema["$defs"][name]["properties"].items():
            assert described.get("description"), f"{name}.{field}"


def test_gpu_names_are_offered_and_other_spellings_allowed(schema):
    gpu = schema["$defs"]["TargetSpec"]["properties"]["gpu"]
    assert gpu["anyOf"][0]["enum"] == list(GPUS)
    assert fits("RTX 4090", gpu, schema)


def test_two_passes_may_share_a_model_and_two_models_a_name():
    def another() -> type[Strict]:
        class Quantize(Strict):
            bits: int

        return Quantize

    schema = json_schema({"a": Quantize, "b": Quantize, "c": another()})
    by_name = {entry["title"]: set(entry["properties"]) for entry in schema["$defs"]["PassEntry"]["oneOf"]}
    assert by_name["a"] == by_name["b"] == {"name", "component", "backend", "type", "exclude", "filters"}
    assert by_name["c"] == {"name", "bits"}


def test_without_passes_any_pass_fits():
    schema = json_schema({})
    assert fits(EXAMPLE, schema, schema)
