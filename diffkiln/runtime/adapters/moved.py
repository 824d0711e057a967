"""Layers that passes gave other names: an adapter's names would mean other layers, so it is refused."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from diffkiln import plugins
from diffkiln.bundle import Manifest
from diffkiln.errors import CallError, MissingDependency


def check_moved(manifest: Manifest, components: Collection[str], file: str) -> None:
    """Checks that the layers of components have their original names.

    The passes themselves say whether they move layers. One whose package is not installed here cannot be asked, so it
    counts as one that does.

    Raises:
        CallError: A pass moved layers of one of the components, or cannot be asked.
    """
    for row in manifest.passes:
        component = row.options.get("component")
        if row.changed and component in components and (reason := _said(row.name, "moves_layers")):
            raise CallError(
                f"load_lora: the pass {row.name} changed the layers of {component}: {reason}. So {file} would be added "
                "to the wrong ones. Put it into the spec instead, by the pass fuse_lora"
            )


def check_folded(manifest: Manifest, unread: Mapping[str, str], file: str) -> None:
    """Checks that no pass computed from weights, once and for all, what an adapter would change.

    Args:
        manifest: The bundle's.
        unread: By component, a layer that the adapter changes and no program reads.
        file: The adapter's, for messages.

    Raises:
        CallError: A pass did, or cannot be asked.
    """
    for row in manifest.passes:
        layer = unread.get(str(row.options.get("component")))
        if row.changed and layer and (reason := _said(row.name, "folds_weights")):
            raise CallError(
                f"load_lora: the pass {row.name} comes before {file}, which changes {layer}: {reason}. Have the pass "
                "keep the layer, add the adapter by the pass fuse_lora, or leave the layer out: ignore=[…]"
            )


def _said(name: str, attribute: str) -> str:
    """Returns what a pass says of itself."""
    known = plugins.plugins("passes")
    try:
        return getattr(known[name].load(), attribute) if name in known else "its package is not installed here"
    except MissingDependency as error:
        return str(error)
