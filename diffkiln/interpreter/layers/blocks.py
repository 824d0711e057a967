"""A model's repeated blocks: which they are, and how to drop some."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch


def repeated_blocks(module: torch.nn.Module) -> list[tuple[str, torch.nn.Module]]:
    """Returns the instances of a module's repeated classes, outermost only, in order.

    diffusers declares these classes in `_repeated_blocks`. Without a declaration, they are those of `_no_split_modules`
    that stand in a `ModuleList`.
    """
    classes = set(getattr(module, "_repeated_blocks", None) or ())
    if not classes:
        listed = {
            type(item).__name__ for part in module.modules() if isinstance(part, torch.nn.ModuleList) for item in part
        }
        classes = listed & set(getattr(module, "_no_split_modules", None) or ())
    found: list[tuple[str, torch.nn.Module]] = []
    for name, child in module.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer, _ in found)
        if name and not inside and type(child).__name__ in classes:
            found.append((name, child))
    return found


def droppable_blocks(module: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Returns, by name, the declared repeated blocks that stand in a list: a model runs them one after the other."""
    if not getattr(module, "_repeated_blocks", None):
        return {}
    lists = {name for name, part in module.named_modules() if isinstance(part, torch.nn.ModuleList)}
    return {name: block for name, block in repeated_blocks(module) if name.rpartition(".")[0] in lists}


def matching(names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """Returns the names that one of the patterns matches."""
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


def drop_blocks(module: torch.nn.Module, patterns: Sequence[str]) -> list[str]:
    """Removes the matching blocks from their lists; later ones move up. Returns the names that they had."""
    gone = matching(list(droppable_blocks(module)), patterns)
    lists: dict[str, set[int]] = {}
    for name in gone:
        home, _, index = name.rpartition(".")
        lists.setdefault(home, set()).add(int(index))
    for home, indices in lists.items():
        path, _, leaf = home.rpartition(".")
        blocks = module.get_submodule(home)
        left = [block for index, block in enumerate(blocks) if index not in indices]  # type: ignore[arg-type]
        setattr(module.get_submodule(path), leaf, torch.nn.ModuleList(left))
    return gone
