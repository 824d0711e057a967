"""The JSON Schema of a spec, for editors and other programs: `diffkiln schema` prints it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from diffkiln.spec.model import PassEntry, Spec
from diffkiln.spec.targets import GPUS

DIALECT = "https://json-schema.org/draft/2020-12/schema"
SCHEMA_ID = "urn:diffkiln:spec:1"
_REF = "#/$defs/{model}"


def json_schema(pass_options: Mapping[str, type[BaseModel]]) -> dict[str, Any]:
    """Returns the JSON Schema 2020-12 of a spec whose passes are those in `pass_options`, each with its options' model.

    A model with `variants` stands for all of them.
    """
    variants = {name: _variants(model) for name, model in sorted(pass_options.items())}
    models = [Spec, PassEntry, *dict.fromkeys(model for several in variants.values() for model in several)]
    names, schema = models_json_schema([(model, "validation") for model in models], ref_template=_REF)
    definitions: dict[str, Any] = schema["$defs"]
    defined = {model: definitions[names[model, "validation"]["$ref"].removeprefix("#/$defs/")] for model in models}
    entries: list[dict[str, Any]] = []
    for name, several in variants.items():
        entries += [_entry(name, defined[model]) for model in several]
        if getattr(pass_options[name], "maps", False):
            entries.append(_mapping(name, entries[-len(several) :]))
    if entries:
        defined[PassEntry].clear()
        defined[PassEntry].update({"title": "Pass", "oneOf": entries})
    _name_gpus(definitions["TargetSpec"]["properties"]["gpu"])
    whole = definitions.pop("Spec")
    return {"$schema": DIALECT, "$id": SCHEMA_ID, **whole, "$defs": _used(definitions, whole)}


def options_schema(model: type[BaseModel]) -> dict[str, Any]:
    """Returns the JSON Schema of a pass's options: one schema for each method if there are several."""
    several = _variants(model)
    if several == [model]:
        return model.model_json_schema()
    return {"title": model.__name__, "oneOf": [variant.model_json_schema() for variant in several]}


def _variants(model: Any) -> list[type[BaseModel]]:
    """Returns the models of a pass with several methods, or the one model."""
    return list(model.variants().values()) if getattr(model, "variants", dict)() else [model]


def _entry(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Returns the schema of one pass in a spec: the constant name, and the fields of its options."""
    described = {"description": options["description"]} if "description" in options else {}
    rest = {
        key: value for key, value in options.items() if key not in ("title", "description", "properties", "required")
    }
    return {
        "title": name,
        **described,
        **rest,
        "type": "object",
        "properties": {"name": {"const": name}, **options.get("properties", {})},
        "required": ["name", *options.get("required", ())],
        "additionalProperties": False,
    }


def _mapping(name: str, entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns the schema of a mapping of components to options of one of these entries, in the place of one component.

    Options that stand beside the mapping are for all components, so that none is required in either place.
    """
    fields: dict[str, Any] = {}
    for entry in entries:
        for key, field in entry["properties"].items():
            fields[key] = _either(fields[key], field) if key in fields else field
    own = {key: field for key, field in fields.items() if key not in ("name", "component")}
    mapping = {
        "type": "object",
        "description": "Options for each of several components, in the place of one component.",
        "minProperties": 1,
        "additionalProperties": {"type": "object", "properties": own, "additionalProperties": False},
    }
    return {
        "title": name,
        "type": "object",
        "properties": {"name": {"const": name}, "mapping": mapping, **own},
        "required": ["name", "mapping"],
        "additionalProperties": False,
    }


def _either(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Returns the schema of a field that two models have: either's values, where both take some values only."""
    values = [value for field in (one, other) for value in field.get("enum", [field.get("const")])]
    if one == other or None in values:
        return one
    rest = {key: value for key, value in one.items() if key not in ("const", "enum", "default")}
    return {**rest, "enum": list(dict.fromkeys(values))}


def _name_gpus(field: dict[str, Any]) -> None:
    """Offers the known names for completion without forbidding the other spellings, which `find_gpu` also takes."""
    field["anyOf"].insert(0, {"enum": list(GPUS)})
    field["examples"] = ["nvidia-rtx-4090"]


def _used(definitions: dict[str, Any], whole: dict[str, Any]) -> dict[str, Any]:
    """Returns the definitions that `whole` refers to, directly or through others."""
    used: dict[str, Any] = {}
    waiting: list[Any] = [whole]
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict):
            name = str(item.get("$ref", "")).removeprefix("#/$defs/")
            if name in definitions and name not in used:
                used[name] = definitions[name]
                waiting.append(definitions[name])
        if isinstance(item, dict | list):
            waiting.extend(item.values() if isinstance(item, dict) else item)
    return dict(sorted(used.items()))
