"""The contents of a bundle so far, and how its JSON is written."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from diffkiln.bundle import EngineEntry, GroupEntry, Variant


@dataclass(frozen=True)
class Packed:
    """The contents of a bundle so far, as the manifest tells them. Later contents are added: `one + other`.

    Attributes:
        variants, engines: rows of the manifest.
        weights: rows of each component's weights.
        features: what a reader of the bundle must know.
        requires: the oldest glibc, CUDA and driver that the engines run with, such as {"glibc": "2.34"}.
        gpus: by target, what its engines hold for a GPU and the packages that run them: the manifest's `runtime.gpus`.
        notices: what a user should know, each once.
    """

    variants: tuple[Variant, ...] = ()
    engines: tuple[EngineEntry, ...] = ()
    weights: Mapping[str, tuple[GroupEntry, ...]] = field(default_factory=dict)
    features: frozenset[str] = frozenset()
    requires: Mapping[str, str] = field(default_factory=dict)
    gpus: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    notices: tuple[str, ...] = ()

    def __add__(self, other: Packed) -> Packed:
        return Packed(
            (*self.variants, *other.variants),
            (*self.engines, *other.engines),
            {**self.weights, **other.weights},
            self.features | other.features,
            _merged(self.requires, other.requires, _newer),
            _merged(self.gpus, other.gpus, _both),
            tuple(dict.fromkeys((*self.notices, *other.notices))),
        )


def total(parts: Iterable[Packed]) -> Packed:
    """Returns the sum of all parts, in their order."""
    return sum(parts, Packed())


def _merged(first: Mapping[str, Any], second: Mapping[str, Any], join: Callable[[Any, Any], Any]) -> dict[str, Any]:
    """Returns the rows of both; `join` makes one of two that have the same name."""
    common = {name: join(first[name], second[name]) for name in first.keys() & second.keys()}
    return {**first, **second, **common}


def _newer(one: str, other: str) -> str:
    return max(one, other, key=lambda version: tuple(map(int, version.split("."))))


def _both(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the row of a target's engines together: tuned if all are, exact if one is, for the SM that says most."""
    row = {**one, **other, "sm": max(one["sm"], other["sm"], key=len)}  # `sm_90a` says more than `sm_90`
    if "autotuned" in one:
        row["autotuned"] = one["autotuned"] and other.get("autotuned", True)
    if "packages" in one:
        row["packages"] = {**one["packages"], **other.get("packages", {})}
    return row


def as_json(data: Any) -> bytes:
    """Returns JSON for people to read: indented, with sorted keys."""
    return (json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()
