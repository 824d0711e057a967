"""`pipeline/` and `spec.json`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffkiln.bundle import BundleWriter
from diffkiln.bundle.layout import LAYERS, PIPELINE, SPEC
from diffkiln.compiler.packed import as_json
from diffkiln.compiler.plan import Plan
from diffkiln.interpreter.layers import described
from diffkiln.interpreter.modular import INDEX
from diffkiln.models.folder import index_of, is_entry, read_index
from diffkiln.models.source import SourceModel
from diffkiln.passes.registry import ListedPass

SCHEDULER = "scheduler"
_PATHS = ("_name_or_path", "name_or_path")


def pack_configuration(writer: BundleWriter, plan: Plan) -> None:
    """Writes `pipeline/` and `spec.json`.

    `pipeline/` holds diffusers' own configuration, without weights, and lists the layers that are stored in another
    form. `spec.json` has the source and the files of the passes pinned.
    """
    source, spec = plan.source, plan.spec
    for name in source.files():
        if name.endswith((".safetensors", ".safetensors.index.json")):
            continue
        if name.partition("/")[0] != SCHEDULER:
            packed = INDEX if name == index_of(source.folder) else name
            writer.write(f"{PIPELINE}{packed}", _portable(source, name, plan.state.scheduler), "config")
    if plan.state.scheduler is not None:
        writer.write(f"{PIPELINE}{SCHEDULER}/scheduler_config.json", _scheduler(plan.state.scheduler), "config")
    for name, module in plan.state.modules.items():
        if layers := described(module):
            writer.write(f"{PIPELINE}{name}/{LAYERS}", as_json(layers), "config")
    written = spec.as_json()
    written["passes"] = [_pinned(index, entry, plan.asked) for index, entry in enumerate(written["passes"])]
    written.pop("$schema", None)
    if plan.gates:
        written["quality"] = [gate.pinned() for gate in plan.gates]
    named = {"model", "config"} - source.origin.keys()
    kept = {key: value for key, value in written["source"].items() if key not in named}
    written["source"] = kept | source.pinned()
    writer.write(SPEC, as_json(written), "config")


def _pinned(index: int, entry: dict[str, Any], listed: Sequence[ListedPass]) -> dict[str, Any]:
    """Returns a pass as the spec gave it, with digests instead of local paths."""
    own = [item.step.options() for item in listed if item.index == index and not item.key]
    return {key: own[0].get(key, value) for key, value in entry.items()} if own else entry


def _scheduler(scheduler: Any) -> bytes:
    config = json.loads(scheduler.to_json_string())
    return as_json({key: value for key, value in config.items() if key not in _PATHS})


def _portable(source: SourceModel, name: str, scheduler: Any) -> bytes:
    """Returns a configuration file without paths of the build machine, and without left-out components.

    The pipeline's index names the scheduler that the passes left.
    """
    data, index = source.path(name).read_bytes(), index_of(source.folder)
    if Path(name).name not in ("config.json", index, "scheduler_config.json", "tokenizer_config.json"):
        return data
    config = read_index(source.folder) if name == index else json.loads(data)
    if isinstance(config, dict):
        for key in _PATHS:
            config.pop(key, None)
        if name == index:
            config["_class_name"] = source.class_name  # which the spec may have chosen
            config |= {key: [None, None] for key in config if is_entry(config[key]) and key not in source.components}
            config |= {key: source.entry(key) for key in source.elsewhere if key in source.components}
            if scheduler is not None:
                config[SCHEDULER] = ["diffusers", type(scheduler).__name__]
    return as_json(config)
