"""What a component makes of constants: evaluated when the bundle is made, and found in the calls as constants."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from diffkiln.program import Builder, Program, Ref
from diffkiln.record.constants import Constants
from diffkiln.record.folds import Evaluation, Fold


@dataclass
class _Table:
    program: Program
    evaluations: dict[Evaluation, None] = field(default_factory=dict)


class Tables:
    """The tables of one component, collected while its calls are rewritten.

    Args:
        component: its name.
        constants: get a key for each value of a table.
    """

    def __init__(self, component: str, constants: Constants) -> None:
        self._component, self._constants = component, constants
        self._tables: dict[str, _Table] = {}

    def values(self, edit: Builder, part: Program, mark: str, args: Sequence[Ref]) -> tuple[Ref, ...]:
        """Returns the constants that a program gives for these constants.

        Args:
            edit: of the call that uses them.
            part: its outputs are distinct results of its operations.
            mark: its fingerprint.
            args: a constant for each of its inputs.
        """
        table = self._tables.setdefault(mark, _Table(part))
        takes = tuple(ref.bare for ref in args)
        types = [part.types[ref.name] for ref in part.outputs]
        stem = "/".join((self._component, mark, *takes))
        gives = tuple(self._constants.add_later(f"{stem}/{index}", type_) for index, type_ in enumerate(types))
        table.evaluations[Evaluation(takes, gives)] = None
        return tuple(edit.constant(key, type_) for key, type_ in zip(gives, types, strict=True))

    def folds(self, regions: Mapping[str, Program], keeps: bool) -> tuple[Fold, ...]:
        """Returns what is evaluated when the bundle is made.

        Args:
            regions: those that the programs call, by name.
            keeps: whether the weights that only they read stay in the bundle.
        """
        return tuple(
            Fold(self._component, each.program, regions, tuple(each.evaluations), keeps)
            for each in self._tables.values()
        )
