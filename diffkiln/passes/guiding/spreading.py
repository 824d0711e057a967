"""Two calls of a step, each on a process of its own: every process makes one of them, and they exchange the results."""

from __future__ import annotations

from collections.abc import Sequence

from diffkiln.passes.guiding.merging import waiting
from diffkiln.program import ALL_GATHER, OWN, Builder, Op, Program, Ref, prune, refs
from diffkiln.program.mesh import GUIDANCE

#: One process for each of the two branches.
_MESH = {"axis": GUIDANCE, "count": 2}


def spread(call: Program, component: str, sites: Sequence[tuple[int, ...]]) -> Program:
    """Merges the two calls of every step into one, whose arguments are each process's own.

    Args:
        call: the pipeline's call.
        component: whose calls are rewritten.
        sites: their places, two for each step; a step with one call stays as it is, and all processes make it.

    Raises:
        ValueError: the calls of a step are not alike, or need each other.
    """
    edit = Builder(call)
    branches = _Branches(edit, component)
    for step, pair in enumerate(sites):
        if len(pair) != 2:
            continue
        first, second = pair
        later = waiting(call.ops, first, second)
        if second in later:
            raise ValueError(f"the second call of {component} in step {step} needs what the first gives")
        shared = branches.ops_of(step, first, second)
        for index in (first, *later):
            edit.replace(index)
        edit.replace(second, *shared, *(call.ops[index] for index in later))
    return prune(edit.build())


class _Branches:
    """The calls that take the place of two, and the values of which each process takes its own, each made once."""

    def __init__(self, edit: Builder, component: str) -> None:
        self._edit, self._component = edit, component
        self._known: dict[tuple[Ref, Ref], Ref] = {}

    def ops_of(self, step: int, first: int, second: int) -> list[Op]:
        """Returns the operations that replace both calls."""
        one, two = (self._edit.current(self._edit.program.ops[at]) for at in (first, second))
        if one.attrs["program"] != two.attrs["program"]:
            raise ValueError(f"the two calls of {self._component} in step {step} have arguments of different types")
        pairs = zip(refs(one.args), refs(two.args), strict=True)
        args = tuple(self._own(left, right, second) for left, right in pairs)
        stem = f"%{self._component}.{step}.own"
        results = {f"{stem}.{index}": self._edit.type_of(ref) for index, ref in enumerate(one.results)}
        call = self._edit.op(one.name, args, results, attrs=one.attrs)
        both = zip(call.results, one.outputs, two.outputs, strict=True)
        return [call, *(Op(ALL_GATHER, (own,), tuple(pair), attrs=_MESH) for own, *pair in both)]

    def _own(self, left: Ref, right: Ref, at: int) -> Ref:
        if left == right:
            return left
        if (left, right) not in self._known:
            stem = f"%{self._component}.own.{len(self._known)}"
            own = self._edit.op(OWN, (left, right), {stem: self._edit.type_of(left)}, attrs=_MESH)
            self._edit.insert(at, own)
            self._known[left, right] = own.results[0]
        return self._known[left, right]
