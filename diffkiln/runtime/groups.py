"""Groups of weights: one safetensors file each, as its header describes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from diffkiln.bundle import GroupEntry, Verified
from diffkiln.bundle.layout import UNUSED
from diffkiln.program.moments import Key
from diffkiln.runtime.accelerator import Event
from diffkiln.runtime.tables import Entry, read_header
from diffkiln.runtime.transfers import Layout, aligned


@dataclass
class Group:
    """One file: its tensors, where its data begins and how many bytes it has."""

    key: Key
    file: str
    entries: Mapping[str, Entry]
    offset: int
    nbytes: int
    layout: Layout  # on a GPU
    pinned: torch.Tensor | None = None  # host copy, when it is streamed to a GPU from host memory
    arrived: Event | None = None  # of its last copy to a GPU


def read_groups(verified: Verified, groups: Mapping[str, Sequence[GroupEntry]]) -> dict[Key, Group]:
    """Returns the groups of weights that programs read, from the headers of their files."""
    found: dict[Key, Group] = {}
    for component, rows in groups.items():
        for row in rows:
            if row.name != UNUSED:
                entries, offset, nbytes = read_header(verified, row.file)
                key = (component, row.name)
                found[key] = Group(key, row.file, entries, offset, nbytes, aligned(entries))
    return found


def keys_by_weight(groups: Mapping[Key, Group]) -> dict[tuple[str, str], Key]:
    """Returns the group of each weight, by its component and name."""
    return {(key[0], name): key for key, group in groups.items() for name in group.entries}
