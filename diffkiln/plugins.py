"""Finds passes, exporters, engines, families, metrics and upscalers by name. One is imported when it is asked for.

A built-in is a module or a package in the room of its kind, named as the plug-in, whose `PLUGIN` is the plug-in itself.
One of another distribution is an entry point of the group `diffkiln.<kind>`: `name = "package.module:object"`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from diffkiln.errors import MissingDependency, SpecError

#: By kind, the rooms of the built-ins. A name that begins with "_" serves its neighbours and is no plug-in.
_ROOMS: Mapping[str, tuple[str, ...]] = {
    "passes": ("passes/model", "passes/program"),
    "exporters": ("exporters",),
    "engines": ("runtime/engines",),
    "families": ("families",),
    "metrics": ("evaluate/metrics",),
    "upscalers": ("models/upscalers",),
}
#: Kinds whose built-ins are folders; modules that lie beside them are no plug-ins.
_FOLDERS = frozenset({"exporters"})


@dataclass(frozen=True)
class Plugin:
    """A plug-in that is installed.

    Attributes:
        name: as specs and bundles have it.
        reference: "module:attribute".
        distribution: the name of the distribution that brings it; "" for a built-in.
        version: of that distribution.
    """

    name: str
    reference: str
    distribution: str = ""
    version: str = ""

    @property
    def requirement(self) -> dict[str, str]:
        """Returns the distribution that a bundle needs to run what the plug-in made: this version or a later one."""
        return {self.distribution: f">={self.version}"} if self.distribution else {}

    def load(self) -> Any:
        """Imports the plug-in.

        Raises:
            MissingDependency: it needs a package that is not installed.
        """
        module, _, attribute = self.reference.partition(":")
        try:
            return getattr(import_module(module), attribute)
        except ModuleNotFoundError as error:
            if (error.name or "").startswith("diffkiln"):
                raise
            owner = self.distribution or "diffkiln[compile]"
            raise MissingDependency(f"{self.name} needs the package {error.name}: pip install '{owner}'") from error


@functools.cache
def plugins(kind: str) -> Mapping[str, Plugin]:
    """Returns every installed plug-in of a kind by its name: built-ins first, then by name.

    Args:
        kind: passes, exporters, engines, families, metrics or upscalers.

    Raises:
        SpecError: two of them have one name.
    """
    found: dict[str, Plugin] = {}
    others = sorted(entry_points(group=f"diffkiln.{kind}"), key=lambda entry: entry.name)
    for plugin in (*_built_in(kind), *map(_installed, others)):
        if plugin.name in found:
            raise SpecError(
                f"two {kind} are called {plugin.name!r}: {_origin(found[plugin.name])} and {_origin(plugin)}. "
                "Uninstall one of the two packages"
            )
        found[plugin.name] = plugin
    return found


def load(kind: str, name: str) -> Any:
    """Imports the plug-in of a kind and name. Raises KeyError where there is none, `MissingDependency` as `Plugin`."""
    return plugins(kind)[name].load()


def _built_in(kind: str) -> list[Plugin]:
    found = []
    for room in _ROOMS[kind]:
        folder = Path(__file__).parent / room
        names = {file.parent.name for file in folder.glob("[a-z]*/__init__.py")}
        if kind not in _FOLDERS:
            names |= {file.stem for file in folder.glob("[a-z]*.py")}
        package = f"diffkiln.{room.replace('/', '.')}"
        found += [Plugin(name, f"{package}.{name}:PLUGIN") for name in sorted(names)]
    return found


def _installed(entry: EntryPoint) -> Plugin:
    owner = (entry.dist.name, entry.dist.version) if entry.dist else ("", "")
    return Plugin(entry.name, entry.value, *owner)


def _origin(plugin: Plugin) -> str:
    return f"that of {plugin.distribution}" if plugin.distribution else "diffkiln's own"
