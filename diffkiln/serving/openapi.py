"""Parts of the OpenAPI document that FastAPI cannot know: bodies that the application reads itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel

from diffkiln.serving.forms import field_of
from diffkiln.serving.offer import Offer
from diffkiln.serving.requests import ErrorBody

JSON, FORM = "application/json", "multipart/form-data"
ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorBody, "description": "The request is refused."},
    "5XX": {"model": ErrorBody, "description": "The server cannot answer now."},
}
_PICTURES = "image/png, image/jpeg, image/webp"


def described(body: type[BaseModel], offers: Sequence[Offer], forms: bool = False) -> dict[str, Any]:
    """Returns the `requestBody` of an operation: JSON, and a form for the bundles that take images.

    Args:
        body: Model of the fields.
        offers: The bundles that can be asked.
        forms: Whether requests may be forms even if they bring no images.
    """
    schema, content = body.model_json_schema(), {}
    takers = [offer for offer in offers if offer.takes]
    if len(takers) < len(offers):
        content[JSON] = {"schema": schema}
    if takers or forms:
        files = _files(takers)
        required = [*schema.get("required", ()), *(files if len(takers) == len(offers) == 1 else ())]
        form = {**schema, "properties": {**_as_form(schema["properties"]), **files}, "required": required}
        encoding = {name: {"contentType": _PICTURES} for name in files}
        content[FORM] = {"schema": form, "encoding": encoding}
    return {"required": True, "content": content}


def _files(takers: Sequence[Offer]) -> dict[str, Any]:
    """Returns the fields that bring images."""
    files: dict[str, Any] = {}
    for offer in takers:
        for keyword, count in offer.takes.items():
            one = {"type": "string", "format": "binary"}
            many = {"type": "array", "items": one, "minItems": count, "maxItems": count}
            files[field_of(keyword, offer.videos)] = one if count == 1 else many
    return files


def _as_form(properties: dict[str, Any]) -> dict[str, Any]:
    """Fields of a form are there or not; none of them is null."""
    found = {}
    for name, schema in properties.items():
        kinds = [kind for kind in schema.get("anyOf", ()) if kind.get("type") != "null"]
        rest = {key: value for key, value in schema.items() if key not in ("anyOf", "default")}
        found[name] = {**rest, **kinds[0]} if kinds else schema
    return found
