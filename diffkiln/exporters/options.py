"""The options of a backend, as a spec states them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from diffkiln.errors import Problem
from diffkiln.spec import Conflict, Strict, Target, refuse


@dataclass(frozen=True)
class Lacks:
    """A mark of a field that only other backends have: any value but the default is refused, with this reason."""

    reason: str
    hint: str = "Remove it"


#: The mark of `fullgraph` where engines are built ahead of time.
UNBROKEN = Lacks("an engine that is built ahead of time has no graph breaks")
#: That of `weights` and `weight_budget_gb` where weights are inputs alone.
WEIGHTLESS = Lacks(
    "its engines take their weights as inputs", "Remove it, or choose a backend whose engines hold weights"
)


class Options(Strict):
    """The options that a spec may give to one backend, beside those of `compile` itself.

    A field may be marked with `Lacks`. `conflicts` is given all fields of the pass, those of `compile` among them.
    `lowers`, a class attribute, has the names that `lowered` may give.

    Class attributes: `lowers`, the names that `lowered` may give.
    """

    lowers: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def conflicts(cls, given: Mapping[str, Any]) -> Iterator[Conflict]:
        yield from super().conflicts(given)
        for name, field in cls.model_fields.items():
            lack = next((mark for mark in field.metadata if isinstance(mark, Lacks)), None)
            if lack and name in given and given[name] not in (field.default, {}):
                yield (name,), refuse(lack.reason, lack.hint)

    def lowered(self) -> dict[str, Any]:
        """Returns what the exporter is given: JSON, part of the engine's cache key and of its row in the manifest."""
        return {}

    def problems(self, component: str, module: torch.nn.Module | None, target: Target, where: str) -> Iterator[Problem]:
        """Yields options that would decide nothing for this component and target; `where` is the pass's JSON path."""
        yield from ()
