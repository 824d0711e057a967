"""The JSON Schema of a spec, for editors and other programs: `diffkiln schema` prints it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from diffkiln.spec.model import PassEntry, Spec
from diffkiln.spec.targets import GPUS

DIALECT = "https://json-schema.org/draft/2020-12/schema"
SCHEMA_ID = "urn:diffkiln:spec:1"
_REF = "#/$defs/{model}"


def json_schema(pass_options: Mapping[str, type[BaseModel]]) -> dict[str, Any]:
    """JSON Schema 2020-12 of a spec whose passes are those named in `pass_options`, each with its options' model."""
    models = [Spec, PassEntry, *dict.fromkeys(pass_options.values())]
    names, schema = models_json_schema([(model, "validation") for model in models], ref_template=_REF)
    definitions: dict[str, Any] = schema["$defs"]
    defined = {model: definitions[names[model, "validation"]["$ref"].removeprefix("#/$defs/")] for model in models}
    entries = [
        _entry(name, defined[model], getattr(model, "maps", False)) for name, model in sorted(pass_options.items())
    ]
    if entries:
        defined[PassEntry].clear()
        defined[PassEntry].update({"title": "Pass", "oneOf": entries})
    _name_gpus(definitions["TargetSpec"]["properties"]["gpu"])
    whole = definitions.pop("Spec")
    return {"$schema": DIALECT, "$id": SCHEMA_ID, **whole, "$defs": _used(definitions, whole)}


def _entry(name: str, options: dict[str, Any], maps: bool) -> dict[str, Any]:
    """The schema of one pass in a spec: the constant name, and the fields of its options.

    One that `maps` takes a mapping of components to options in the place of one component.
    """
    described = {"description": options["description"]} if "description" in options else {}
    rest = {
        key: value for key, value in options.items() if key not in ("title", "description", "properties", "required")
    }
    fields, required = options.get("properties", {}), list(options.get("required", ()))
    entry = {
        "title": name,
        **described,
        **rest,
        "type": "object",
        "properties": {"name": {"const": name}, **fields},
        "required": ["name", *required],
        "additionalProperties": False,
    }
    if maps:
        own = {key: value for key, value in fields.items() if key != "component"}
        entry["properties"]["mapping"] = {
            "type": "object",
            "description": "Options for each of several components, in the place of one component.",
            "minProperties": 1,
            "additionalProperties": {"type": "object", "properties": own, "additionalProperties": False},
        }
        entry["required"] = ["name"]
        entry["oneOf"] = [{"required": required}, {"required": ["mapping"]}]
    return entry


def _name_gpus(field: dict[str, Any]) -> None:
    """Offer the known names for completion without forbidding the other spellings, which `find_gpu` also takes."""
    field["anyOf"].insert(0, {"enum": list(GPUS)})
    field["examples"] = ["nvidia-rtx-4090"]


def _used(definitions: dict[str, Any], whole: dict[str, Any]) -> dict[str, Any]:
    """The definitions that `whole` refers to, directly or through others."""
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
