"""What a source's model card says that its bundle's has to repeat: the licence, and what the model came from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

CARD = "README.md"
MAX_CARD_BYTES = 1 << 20
_STRINGS = ("license_name", "license_link", "pipeline_tag")


def read_card(folder: Path, origin: Mapping[str, Any]) -> dict[str, Any]:
    """Licence, base models and task of the model in `folder`, as its README.md states them; nothing where it does not.

    A link to the licence that is relative is made absolute where the model is one of the Hub's, and left out elsewhere.
    """
    metadata = _metadata(folder / CARD)
    found: dict[str, Any] = {key: metadata[key] for key in _STRINGS if isinstance(metadata.get(key), str)}
    for key in ("license", "base_model"):
        names = metadata.get(key)
        names = [names] if isinstance(names, str) else names
        if isinstance(names, list) and names and all(isinstance(name, str) for name in names):
            found[key] = names if key == "base_model" or len(names) > 1 else names[0]
    link = found.pop("license_link", "")
    if link and "://" not in link and "model" in origin:
        link = f"https://huggingface.co/{origin['model']}/blob/{origin['revision']}/{link}"
    return found | ({"license_link": link} if link.startswith(("https://", "http://")) else {})


def _metadata(path: Path) -> Mapping[str, Any]:
    import yaml
    from huggingface_hub import metadata_load

    try:
        if path.stat().st_size > MAX_CARD_BYTES:
            return {}
        return metadata_load(path) or {}
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}  # a card is for people; one that cannot be read states no licence, and the bundle's card says so
