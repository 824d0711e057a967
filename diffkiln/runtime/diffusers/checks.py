"""What a stranger's bundle may have diffusers and transformers do: build classes of their own."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from diffkiln.bundle import Verified
from diffkiln.bundle.configurations import is_configuration, reaching_out
from diffkiln.bundle.layout import PIPELINE
from diffkiln.errors import Incompatible, IntegrityError, ManifestInvalid
from diffkiln.runtime.diffusers.building import class_of

_HINT = "Get the bundle from somebody whom you trust"


def check_configurations(verified: Verified) -> None:
    """Refuses a bundle whose configuration would make a library fetch or run code.

    Raises:
        IntegrityError: with the file and the key.
        ManifestInvalid: a configuration is not JSON.
    """
    for row in verified.manifest.files:
        if row.path.startswith(PIPELINE) and is_configuration(Path(row.path).name):
            try:
                found = reaching_out(verified.read(row.path))
            except (ValueError, RecursionError) as error:
                raise ManifestInvalid(f"{row.path!r} is not valid JSON: {error}") from None
            if found:
                raise IntegrityError(f"{row.path}: {found}. {_HINT}")


def check_index(pipeline: Any, index: Mapping[str, Any], weights: Collection[str]) -> None:
    """Refuses a model_index.json that makes diffusers load more than tokenizers, processors and schedulers.

    Args:
        pipeline: the class.
        index: what the file holds.
        weights: components whose weights the manifest has.

    Raises:
        Incompatible: the installed libraries lack a class, or the pipeline is made of others that are fetched.
        IntegrityError: it names something else.
    """
    if pipeline._load_connected_pipes:
        raise Incompatible(f"{pipeline.__name__} has diffusers fetch other pipelines. Load it without as_diffusers")
    _, settings = pipeline._get_signature_keys(pipeline)  # diffusers hands these on as they are
    for component, entry in index.items():
        known = component.startswith("_") or component in weights or component in settings
        listed = isinstance(entry, list) and not known
        if listed and entry != [None, None]:
            _check_part(*library_and_class(component, entry))


def _check_part(library: str, name: str) -> None:
    kind = class_of(library, name)
    pipeline = any(base.__name__ == "DiffusionPipeline" for base in kind.__mro__)
    if pipeline or issubclass(kind, torch.nn.Module) or not hasattr(kind, "from_pretrained"):
        raise IntegrityError(f"model_index.json names {name}, and the bundle has no weights of such a model. {_HINT}")
    if "onnx" in kind.__module__:
        raise IntegrityError(f"model_index.json names {name}, which runs an ONNX model, and that is native code")


def library_and_class(component: str, entry: Any) -> tuple[str, str]:
    """Returns library and class of an entry of model_index.json. Raises `IntegrityError` for any other entry."""
    if not isinstance(entry, list) or len(entry) != 2 or not all(isinstance(item, str) for item in entry):
        raise IntegrityError(f"model_index.json says {json.dumps(entry)[:80]} of {component!r}: no library and class")
    return entry[0], entry[1]
