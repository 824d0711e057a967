"""Bundles without native code whose ids are guarded, and what of a manifest depends on no machine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.frozen.kinds import KINDS, QUANTIZE, Kind, of

FUSE = {"name": "fuse_qkv", "component": "transformer"}
CASTS = [
    {"name": "cast", "component": component, "dtype": "bfloat16"}
    for component in ("transformer", "text_encoder", "text_encoder_2", "vae")
]
QUANTO = {"component": "text_encoder_2", "backend": "quanto", "type": "int8"}
SEVERAL = (
    FUSE,
    {"name": "prune", "component": "transformer", "blocks": ["single_transformer_blocks.1"]},
    QUANTIZE,
    {"name": "quantize", **QUANTO},
    {"name": "layerwise_cast", "component": "vae"},
)
SCHEDULER = {"name": "scheduler", "type": "EulerDiscreteScheduler", "config": {"use_karras_sigmas": True}}
HALVED = {"name": "guidance", "component": "transformer", "batch": "halved"}
#: The arithmetic between the denoiser's calls as a region of its own, which ONNX Runtime runs.
OUTLINED = {"name": "compile", "component": "scheduler", "backend": "onnx"}

BUNDLES: Mapping[str, Kind] = {
    "plain": of("pixart", FUSE),
    "cast": of("flux", *CASTS),
    "several": of("flux", *SEVERAL),
    "scheduler": of("pixart", SCHEDULER),
    "guidance": of("pixart", HALVED),
    "outlined": of("flux", OUTLINED),
} | {name: kind for name, kind in KINDS.items() if name not in ("data", "engine")}


def portable(identity: str, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what two machines agree on: the id and every digest, but none of an engine."""
    files = {row["path"]: row for row in manifest["files"]}
    native = {path for path, row in files.items() if row["role"] == "native"}
    rest = {key: value for key, value in manifest.items() if key != "files"}
    return {
        "id": None if native else identity,
        "files": {path: None if path in native else _shown(row) for path, row in files.items()},
        **rest,
    }


def _shown(row: Mapping[str, Any]) -> str:
    """A file in one line of a golden file."""
    return f"{row['role']}, {row['size']} bytes, {row['sha256'][:16]}"
