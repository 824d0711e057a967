"""`licences.json`: under which terms the base model and the adapters say that they stand."""

from __future__ import annotations

from typing import Any

from diffkiln.bundle import BundleWriter
from diffkiln.bundle.layout import LICENCES
from diffkiln.compiler.packed import as_json
from diffkiln.compiler.plan import Plan
from diffkiln.models.licences import licence_in, licence_of


def pack_licences(writer: BundleWriter, plan: Plan) -> None:
    """Writes the licences: a row for the base model and one for each adapter, null where none is stated.

    The file is hashed, so it is signed with the bundle.
    """
    rows: list[dict[str, Any]] = [{"of": "base model", **plan.source.pinned()} | licence_of(plan.source.folder)]
    stated = plan.source.pinned().get("components", {})
    for name in plan.source.elsewhere:
        for member in plan.source.components[name].folders().values():
            row = {"of": "component", "component": name, "source": stated[name]}
            rows.append(row | (licence_of(member) or licence_of(member.parent)))
    for item in plan.listed:
        for stated, path in item.step.origins():
            licence = licence_of(path.parent) | licence_in(path)
            kind = "component" if item.step.adds else "adapter"
            rows.append({"of": kind, "component": item.step.component, **stated} | licence)
    writer.write(LICENCES, as_json([{"license": None, **row} for row in rows]), "doc")
