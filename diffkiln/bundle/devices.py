"""The device that each of a bundle's targets is: the same for all, or each its own where CPUs and GPUs are mixed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from diffkiln.bundle.manifest import Manifest

MIXED = "mixed_devices"


def device_policy(devices: Mapping[str, str]) -> dict[str, Any]:
    """Returns the devices' part of the manifest's `runtime`, in the targets' order; `devices` only if they differ."""
    first = next(iter(devices.values()))
    return {"device": first} | ({"devices": dict(devices)} if len(set(devices.values())) > 1 else {})


def device_features(features: Iterable[str], devices: Mapping[str, str]) -> tuple[str, ...]:
    """Returns the features that a reader of this bundle must know: the given ones, and mixed devices if any."""
    mixed = {MIXED} if len(set(devices.values())) > 1 else set()
    return tuple(sorted({*features} - {MIXED} | mixed))


def devices_of(manifest: Manifest) -> frozenset[str]:
    """Returns the devices that the bundle is for: "cpu", "cuda", or both."""
    stated: Any = manifest.runtime.get("devices", {})
    return frozenset(stated.values()) or frozenset([str(manifest.runtime.get("device", "cpu"))])


def device_of(manifest: Manifest, target: str) -> str:
    """Returns the device of one target."""
    stated: Any = manifest.runtime.get("devices", {})
    return str(stated.get(target, manifest.runtime.get("device", "cpu")))
