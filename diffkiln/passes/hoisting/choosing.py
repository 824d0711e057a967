"""Which operations are evaluated ahead: those that compute much of weights, and give less than these weigh."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from diffkiln.passes.hoisting.dependence import Depends, Found
from diffkiln.passes.hoisting.phases import in_phases
from diffkiln.program import ATTENTION, REGION, Op, Program
from diffkiln.program.operators import nbytes

#: Operators that are worth evaluating ahead. Others, such as norms, are cheap, and stay where their results are used.
_PRODUCTS = frozenset(("mm", "bmm", "matmul", "mv", "outer", "addmm", "baddbmm", "addmv", "linear", "embedding"))
_PRODUCTS |= {"_int_mm", "_weight_int8pack_mm", "_scaled_mm", "scaled_dot_product_attention", "convolution"}
_PRODUCTS |= {"conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"}


def matches(weight: str, pattern: str) -> bool:
    """Returns True if the pattern matches a weight, or the layer or the group of layers that it belongs to."""
    parts = weight.split(".")
    return any(fnmatchcase(".".join(parts[:count]), pattern) for count in range(1, len(parts) + 1))


@dataclass(frozen=True)
class Rules:
    """Rules for a component.

    Attributes:
        rows: how often what depends on the schedule is evaluated when the bundle is made: the rows of its tables.
        timesteps: how often what also depends on the request is evaluated in a call, at most.
        keep: patterns of layers whose operations stay in the loop.
    """

    rows: int
    timesteps: int
    keep: tuple[str, ...] = ()

    def times(self, on: Depends) -> int:
        """Returns how many results of an operation are held at once; 0 for one a request, which saves work anyway."""
        if Depends.REQUEST in on:
            return self.timesteps if Depends.SCHEDULE in on else 0
        return self.rows if Depends.SCHEDULE in on else 1

    def keeps(self, weight: str) -> bool:
        """Returns True if a weight of the component is one of a layer that stays."""
        return any(matches(weight, pattern) for pattern in self.keep)


@dataclass(frozen=True)
class Chosen:
    """The places of operations that are evaluated ahead; and how many are not, since their results weigh more."""

    ahead: frozenset[int] = frozenset()
    dear: int = 0


def choose(program: Program, found: Found, rules: Rules, inside: Callable[[Op], Mapping[str, int]]) -> Chosen:
    """Returns the operations of a program that are evaluated ahead.

    Args:
        found: what its values depend on.
        inside: for a REGION operation, the bytes of the weights that it reads.
    """
    own = {at: _own_weights(program, at, found, inside) for at in _ahead(program, found)}
    own = {at: weights for at, weights in own.items() if not any(map(rules.keeps, weights))}
    dear = 0
    while True:
        given = in_phases(program, found, own).given
        costs = _Costs(program, found, rules, own)
        larger = [at for at in own if not given.isdisjoint(program.ops[at].outputs) and costs.is_dear(at, given)]
        if not larger:
            return Chosen(frozenset(own), dear)
        dear += sum(bool(own[at]) for at in larger)
        own = {at: weights for at, weights in own.items() if at not in larger}


class _Costs:
    """The bytes that values take which are evaluated ahead, against those that evaluating them in the loop takes.

    Args:
        own: the operations that are evaluated ahead, with the bytes of their weights.
    """

    def __init__(self, program: Program, found: Found, rules: Rules, own: Mapping[int, Mapping[str, int]]) -> None:
        self._program, self._found, self._rules, self._own = program, found, rules, own
        self._position = {name: at for at, op in enumerate(program.ops) for name in op.outputs}
        self._known: dict[int, int] = {}

    def is_dear(self, at: int, given: frozenset[str]) -> bool:
        """Returns True if the results that are `given` to other parts take more than the loop would."""
        return self._held(at, given) > self._computed(at, given)

    def _held(self, at: int, given: frozenset[str] | None = None) -> int:
        op = self._program.ops[at]
        names = op.outputs if given is None else [name for name in op.outputs if name in given]
        return sum(nbytes(self._program.types[name]) for name in names) * self._rules.times(self._found[op.outputs[0]])

    def _computed(self, at: int, given: frozenset[str]) -> int:
        """Returns the bytes of the operation's weights, and the least that the values take which it is computed of."""
        before = [each for each in self._before(at) if given.isdisjoint(self._program.ops[each].outputs)]
        return sum(self._own[at].values()) + sum(self._least(each, given) for each in before)

    def _least(self, at: int, given: frozenset[str]) -> int:
        if at not in self._known:
            self._known[at] = min(self._held(at), self._computed(at, given))
        return self._known[at]

    def _before(self, at: int) -> set[int]:
        """Returns the operations evaluated ahead whose results this one takes, after cheap operations or directly."""
        waiting, seen, found = [at], {at}, set[int]()
        while waiting:
            uses = {
                self._position[ref.name] for ref in self._program.ops[waiting.pop()].uses if ref.name in self._position
            }
            found |= uses & self._own.keys()
            waiting += uses - self._own.keys() - seen
            seen |= uses
        return found - {at}


def _ahead(program: Program, found: Found) -> list[int]:
    """Returns the places of operations that compute much and do not follow the latents."""
    return [at for at, op in enumerate(program.ops) if _computes(op) and Depends.LATENTS not in found[op.outputs[0]]]


def _computes(op: Op) -> bool:
    return op.name in (REGION, ATTENTION) or (op.is_aten and op.name.split(".")[1] in _PRODUCTS)


def _own_weights(program: Program, at: int, found: Found, inside: Callable[[Op], Mapping[str, int]]) -> dict[str, int]:
    """Returns the bytes of the weights that an operation reads itself, or by operations that only unpack them."""
    makers = {name: op for op in program.ops for name in op.outputs}
    waiting, weights = [program.ops[at]], {}
    while waiting:
        op = waiting.pop()
        weights |= dict(inside(op)) if op.name == REGION else {}
        for ref in op.uses:
            if ref.name.startswith("@"):
                weights[ref.bare] = nbytes(program.types[ref.name])
            elif ref.name in makers and not found[ref.name] and not _computes(makers[ref.name]):
                waiting.append(makers[ref.name])
    return weights
