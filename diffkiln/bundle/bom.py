"""A bundle as a CycloneDX ML-BOM (1.6): what it is, what it was made from, under which licences, what it needs.

Written from the bundle alone, and without a time: one bundle always gives the same document.
https://cyclonedx.org/docs/1.6/json/
"""

from __future__ import annotations

import json
import uuid
from typing import Any

from diffkiln.bundle import Verified, strict_json
from diffkiln.bundle.layout import LICENCES
from diffkiln.errors import ManifestInvalid
from diffkiln.version import __version__

_MAX_BYTES = 2**24

#: Cards write SPDX's names in small letters; CycloneDX wants them as SPDX does. Others are licences by name.
_SPDX = {
    name.lower(): name
    for name in (
        "Apache-2.0", "MIT", "BSD-2-Clause", "BSD-3-Clause", "GPL-3.0", "LGPL-3.0", "AGPL-3.0", "MPL-2.0",
        "CC0-1.0", "CC-BY-4.0", "CC-BY-SA-4.0", "CC-BY-NC-4.0", "CC-BY-NC-SA-4.0", "CC-BY-NC-ND-4.0", "Unlicense",
    )
}  # fmt: skip


def bom(verified: Verified) -> dict[str, Any]:
    """Returns the bill of materials as a JSON document.

    Raises:
        ManifestInvalid: the bundle's licences are not written as the compiler writes them.
    """
    manifest = verified.manifest
    models = [_model(index, row) for index, row in enumerate(_stated(verified))]
    packages = {"torch": manifest.requires.torch, **manifest.requires.packages}
    libraries = [
        {"type": "library", "bom-ref": f"package:{name}", "name": name, "version": wanted, "purl": f"pkg:pypi/{name}"}
        for name, wanted in sorted(packages.items())
    ]
    files = [
        {
            "type": "file",
            "bom-ref": f"file:{row.path}",
            "name": row.path,
            "hashes": [{"alg": "SHA-256", "content": row.sha256}],
        }
        for row in manifest.files
        if row.role in ("weights", "native")
    ]
    components = [*models, *libraries, *files]
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, f'diffkiln:{verified.id}')}",
        "version": 1,
        "metadata": {"tools": {"components": [_tool()]}, "component": _bundle(verified, models)},
        "components": components,
        "dependencies": [
            {"ref": verified.id, "dependsOn": [item["bom-ref"] for item in components]},
            *({"ref": item["bom-ref"]} for item in components),
        ],
    }


def _stated(verified: Verified) -> list[dict[str, Any]]:
    if not any(row.path == LICENCES for row in verified.manifest.files):
        return []
    try:
        rows = strict_json.loads(verified.read(LICENCES), max_bytes=_MAX_BYTES)
    except strict_json.StrictJSONError as error:
        raise ManifestInvalid(f"{LICENCES!r}: {error}") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) and {"of", "digest"} <= row.keys() for row in rows):
        raise ManifestInvalid(f"{LICENCES!r} is not a list of models with their licences")
    return rows


def _tool() -> dict[str, Any]:
    return {"type": "application", "name": "diffkiln", "version": __version__}


def _bundle(verified: Verified, models: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns the entry of the bundle itself, with the licences of everything that went into it."""
    manifest = verified.manifest
    properties = [
        {"name": f"diffkiln:pass:{index}:{row.name}", "value": json.dumps(row.options, sort_keys=True)}
        for index, row in enumerate(manifest.passes)
    ]
    licences = [licence for model in models for licence in model.get("licenses", ())]
    unique = {json.dumps(licence, sort_keys=True): licence for licence in licences}
    return {
        "type": "machine-learning-model",
        "bom-ref": verified.id,
        "name": manifest.pipeline.class_name,
        "version": verified.id[:12],
        "hashes": [{"alg": "SHA-256", "content": verified.id}],
        "modelCard": {"modelParameters": {"modelArchitecture": manifest.pipeline.class_name}},
        "properties": properties,
    } | ({"licenses": list(unique.values())} if unique else {})


def _model(index: int, row: dict[str, Any]) -> dict[str, Any]:
    """Returns the entry of a source of weights: the base model, or an adapter."""
    name = row.get("model") or row.get("repo") or row.get("architecture") or f"a local {row['of']}"
    model: dict[str, Any] = {"type": "machine-learning-model", "bom-ref": f"source:{index}", "name": str(name)}
    if revision := row.get("revision"):
        model["version"] = str(revision)
    model["description"] = str(row["of"])
    digest = {"name": "diffkiln:digest", "value": str(row["digest"])}
    return model | {"properties": [digest]} | ({"licenses": [_licence(row)]} if row.get("license") else {})


def _licence(row: dict[str, Any]) -> dict[str, Any]:
    spdx = _SPDX.get(str(row["license"]).lower())
    licence = {"id": spdx} if spdx else {"name": str(row.get("license_name") or row["license"])}
    link = str(row.get("license_link", ""))
    return {"license": licence | ({"url": link} if link.startswith("https://") else {})}
