"""Plain attributes of a component's parts that a pipeline sets while it runs: GLIGEN switches parts of its U-Net off
after the first steps.

A component is recorded once for each setting that a call uses it with, and has its own again afterwards.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch

#: (path of the part, attribute, value), of all parts whose attribute is not the component's own; sorted.
Settings = tuple[tuple[str, str, Any], ...]
_PLAIN = (bool, int, float, str, type(None))


@contextlib.contextmanager
def with_settings(module: torch.nn.Module, settings: Settings) -> Iterator[None]:
    """Gives a module the settings of a call inside the `with` block. Paths that the module lacks are left out."""
    parts = dict(module.named_modules()) if settings else {}
    set_here = [(vars(parts[path]), name, value) for path, name, value in settings if path in parts]
    own = [(table, name, table[name]) for table, name, _ in set_here]
    try:
        for table, name, value in set_here:
            table[name] = value
        yield
    finally:
        for table, name, value in own:
            table[name] = value


class Switches:
    """The plain attributes that a call sets on the parts of its components.

    What a component sets itself, while it runs, is no setting: `itself` is around that.

    Args:
        pipe: the meta model.
    """

    def __init__(self, pipe: Any) -> None:
        modules = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
        self._paths: dict[torch.nn.Module, dict[str, str]] = {}
        for name, module in modules.items():
            for path, part in module.named_modules():
                self._paths.setdefault(part, {})[name] = path
        self._own: dict[tuple[torch.nn.Module, str], Any] = {}
        self._asleep = False

    def of(self, name: str) -> Settings:
        """Returns the settings that a component has at present."""
        found = []
        for (part, attribute), own in self._own.items():
            path, value = self._paths[part].get(name), vars(part)[attribute]
            if path is not None and value != own:
                found.append((path, attribute, value))
        return tuple(sorted(found, key=lambda each: each[:2]))

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Notices what is set inside the `with` block; afterwards all parts have their own attributes."""
        original: Any = torch.nn.Module.__setattr__

        def noticing(part: torch.nn.Module, attribute: str, value: Any) -> None:
            if not self._asleep and part in self._paths and isinstance(value, _PLAIN):
                before = vars(part).get(attribute, self)
                if isinstance(before, _PLAIN):
                    self._own.setdefault((part, attribute), before)
            original(part, attribute, value)

        try:
            with mock.patch.object(torch.nn.Module, "__setattr__", noticing):
                yield
        finally:
            for (part, attribute), own in self._own.items():
                vars(part)[attribute] = own
            self._own.clear()

    @contextlib.contextmanager
    def itself(self) -> Iterator[None]:
        """Lets a component set what it likes inside the `with` block."""
        before, self._asleep = self._asleep, True
        try:
            yield
        finally:
            self._asleep = before
