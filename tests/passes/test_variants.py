"""Passes with several methods: their JSON Schema and what `diffkiln passes` prints agree with their models."""

import json
from pathlib import Path
from typing import Any

import pytest

from diffkiln.bundle.manifest import AppliedPass
from diffkiln.cli import main
from diffkiln.errors import Incompatible, SpecError
from diffkiln.passes.registry import option_models, pass_class, read_passes
from diffkiln.passes.variants import constant
from diffkiln.runtime.diffusers.building import pass_of
from diffkiln.spec import PassEntry, json_schema
from tests.spec.conftest import EXAMPLE
from tests.spec.test_schema import fits

SPECS = [*Path(__file__).parents[2].glob("examples/**/*.json")]
NAMES = [name for name, cls in option_models().items() if cls.variants()]


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    return json_schema(option_models())


def _fits(entry: dict[str, Any], schema: dict[str, Any]) -> bool:
    return fits({**EXAMPLE, "passes": [entry]}, schema, schema)


@pytest.mark.parametrize("name", option_models())
def test_examples_of_a_pass_fit_the_schema(schema, name):
    assert all(_fits(example, schema) for example in option_models()[name].examples)


def test_the_specs_in_examples_fit_the_schema(schema):
    read = [json.loads(path.read_text()) for path in SPECS]
    # The schema is of plain specs, and those to be tuned hold choices.
    specs = [spec for spec in read if "spec_version" in spec and "tune" not in spec]
    assert len(specs) >= 3
    assert all(fits(spec, schema, schema) for spec in specs)


@pytest.mark.parametrize(
    ("entry", "legal"),
    [
        ({"name": "cache_schedule", "method": "fora", "interval": 2}, True),
        ({"name": "cache_schedule", "method": "fora", "interval": 2, "depth": 1}, False),
        ({"name": "cache_schedule", "method": "fora", "interval": 2, "dynamic": True}, False),
        ({"name": "cache_schedule", "method": "pab", "interval": 2, "dynamic": True}, True),
        ({"name": "cache_schedule", "method": "pab", "interval": 2}, False),
        ({"name": "cache_schedule", "interval": 2}, False),
        ({"name": "quantize", "type": "int8_dynamic"}, True),
        ({"name": "quantize", "type": "int8_dynamic", "backend": "torchao"}, True),
        ({"name": "quantize", "type": "int8_dynamic", "group_size": 32}, False),
        ({"name": "quantize", "type": "nf4"}, False),
        ({"name": "quantize", "type": "nf4", "backend": "bitsandbytes", "double_quant": True}, True),
    ],
)
def test_the_schema_takes_what_the_models_take(schema, entry, legal):
    entry = {**entry, "component": "transformer"}
    assert _fits(entry, schema) is legal
    if legal:
        assert read_passes([PassEntry.model_validate(entry)])
        return
    with pytest.raises(SpecError):
        read_passes([PassEntry.model_validate(entry)])


def test_the_schema_takes_a_mapping_of_components(schema):
    rows = {"transformer": {"exclude": ["*norm*"]}, "vae": {"backend": "bitsandbytes", "type": "nf4"}}
    assert _fits({"name": "quantize", "type": "int8_dynamic", "mapping": rows}, schema)
    assert not _fits({"name": "quantize", "mapping": {"vae": {"type": "int9"}}}, schema)
    assert not _fits({"name": "quantize", "component": "vae", "mapping": rows}, schema)


@pytest.mark.parametrize("name", NAMES)
def test_each_method_is_printed_with_its_own_options(name, capsys):
    assert main(["passes", name]) == 0
    told = " ".join(capsys.readouterr().out.split())
    for model in pass_class(name).variants().values():
        values = [(field, constant(model, field)) for field in model.discriminators]
        begin = ", ".join(f'"{field}": {json.dumps(value)}' for field, value in sorted(values, reverse=True) if value)
        _, _, rest = told.partition(f"{begin}: ")
        section = rest.partition(' "method": ' if name == "cache_schedule" else ' "type": ')[0]
        assert section
        printed = {field for field in _all(name) if f" {field} (" in section}
        assert printed == set(model.own_fields()) - pass_class(name).model_fields.keys()


def _all(name: str) -> set[str]:
    return {field for model in pass_class(name).variants().values() for field in model.own_fields()}


@pytest.mark.parametrize("name", NAMES)
def test_the_json_of_a_pass_has_one_schema_a_method(name, capsys):
    assert main(["passes", name, "--json"]) == 0
    (schema,) = json.loads(capsys.readouterr().out).values()
    assert len(schema["oneOf"]) == len(pass_class(name).variants())


_STEPS = {"start": 1, "end": 0}
#: What a spec says, and what a manifest holds beside it and the component.
WRITTEN: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"method": "mask", "steps": [1, 0]}, {"dynamic": False, "keep": "output"}),
    ({"method": "fora", "interval": 2}, {"dynamic": False, **_STEPS}),
    ({"method": "fora", "steps": [1, 0]}, {"dynamic": False, **_STEPS}),
    ({"method": "first_block", "interval": 2}, {"dynamic": False, **_STEPS}),
    ({"method": "dbcache", "steps": "calibrated"}, {"dynamic": False, **_STEPS, "front": 1, "back": 0}),
    ({"method": "taylorseer", "interval": 2}, {"dynamic": False, **_STEPS, "keep": "output", "order": 1}),
    (
        {"method": "magcache", "ratios": [1.0, 0.5]},
        {"dynamic": False, "threshold": 0.06, "max_reused": 3, "retention": 0.2},
    ),
    ({"method": "deepcache", "interval": 2}, {"dynamic": False, **_STEPS, "depth": 1}),
    ({"method": "first_block", "dynamic": True, "threshold": 0.1}, {}),
    ({"method": "seacache", "dynamic": True, "threshold": 0.1}, {}),
    ({"method": "pab", "dynamic": True, "interval": 2}, {}),
    ({"method": "fastercache", "dynamic": True, "interval": 2}, {}),
    ({"type": "int8_weight_only"}, {"backend": "torchao"}),
    ({"type": "int4_weight_only"}, {"backend": "torchao", "group_size": 64}),
    ({"type": "float8_dynamic"}, {"backend": "torchao", "granularity": "per_row"}),
    ({"backend": "bitsandbytes", "type": "int8"}, {}),
    ({"backend": "bitsandbytes", "type": "nf4"}, {"double_quant": False}),
    ({"backend": "quanto", "type": "int8"}, {}),
]


@pytest.mark.parametrize(("given", "more"), WRITTEN, ids=str)
def test_a_manifest_holds_what_was_given_and_the_defaults_of_the_method(given, more):
    name = "cache_schedule" if "method" in given else "quantize"
    patterns = {} if "method" in given else {"include": ["*"], "exclude": []}
    (item,) = read_passes([PassEntry.model_validate({"name": name, "component": "unet", **given})])
    assert item.step.options() == {"component": "unet", **given, **more, **patterns}


def test_a_method_of_a_bundle_that_is_not_known_is_told():
    row = AppliedPass(name="quantize", version=1, options={"backend": "torchao", "type": "int9"}, changed=True)
    with pytest.raises(Incompatible, match="cannot repeat in diffusers what quantize did: there is no type 'int9'"):
        pass_of(row)
    known = row.model_copy(update={"options": {"backend": "torchao", "type": "int8_dynamic"}})
    assert pass_of(known) is pass_class("quantize").variants()["int8_dynamic of torchao"]
