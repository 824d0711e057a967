"""What a source's model card says that its bundle's has to repeat: the licence, and what the model came from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffkiln.models.licences import FIELDS, stated


def read_card(folder: Path, origin: Mapping[str, Any]) -> dict[str, Any]:
    """Returns licence, base models and task from the README.md of the model in `folder`; only those that it states.

    A relative link to the licence becomes absolute for a model of the Hub, and is left out otherwise.
    """
    words = stated(folder, (*FIELDS, "pipeline_tag", "base_model"))
    found: dict[str, Any] = {name: given[0] for name, given in words.items()}
    for name in ("license", "base_model"):
        if name in words and (name == "base_model" or len(words[name]) > 1):
            found[name] = words[name]
    link = found.pop("license_link", "")
    if link and "://" not in link and "model" in origin:
        link = f"https://huggingface.co/{origin['model']}/blob/{origin['revision']}/{link}"
    return found | ({"license_link": link} if link.startswith(("https://", "http://")) else {})
