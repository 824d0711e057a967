"""A region in, files out: its program as JSON, and the options."""

from __future__ import annotations

import json
from pathlib import Path

from diffkiln.exporters.artefact import Artefact, Lowering
from diffkiln.exporters.base import contiguous, input_specs
from diffkiln.exporters.cache import EngineCache
from diffkiln.program import dumps, program_to_json
from diffkiln_replay.check import Replay


def tools(lowering: Lowering) -> dict[str, str]:
    return {}


def build(lowering: Lowering, folder: Path, cache: EngineCache) -> Artefact:
    region, options = lowering.region, dict(lowering.options)
    (folder / "region.json").write_bytes(dumps(program_to_json(region)))
    (folder / "options.json").write_text(json.dumps(options))
    outputs = tuple(contiguous(region.types[ref.name]) for ref in region.outputs)
    return Artefact(Replay.name, folder, input_specs(region), outputs, options)
