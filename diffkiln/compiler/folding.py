"""Constants that take a component's weights to be known, evaluated while these come into memory."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import torch

from diffkiln.errors import PassError
from diffkiln.interpreter.aten import Interpreter
from diffkiln.interpreter.layers.scaled import row_scales
from diffkiln.program import ATTENTION, REGION, Op, split_off, weight_in
from diffkiln.record.constants import Constants
from diffkiln.record.folds import Evaluation, Fold
from diffkiln.record.pipeline import Recording
from diffkiln.runtime.attention import packaged

_CPU = torch.device("cpu")

#: Weights by their names in the component.
Weights = Mapping[str, torch.Tensor]


class Folding:
    """The evaluation of a component's folds, which fills their constants.

    An operation runs as soon as its weights have come, so a large component is never in memory as a whole. The kernels
    are those that replay the component, so tables have the bits that the loop would compute.
    """

    def __init__(self, recording: Recording, component: str) -> None:
        self._component, self._constants = component, recording.constants
        own = [fold for fold in recording.folds if fold.component == component]
        self._waiting = {key for fold in own for each in fold.evaluations for key in each.gives}
        self._left = [
            _Work(fold, at, values) for fold in own for values in [_values_of(fold)] for at in _positions(fold)
        ]
        self._held: Weights = {}

    def add(self, weights: Weights) -> None:
        """Takes the weights that have data, and evaluates what they suffice for."""
        held = {**self._held, **{name: tensor for name, tensor in weights.items() if not tensor.is_meta}}
        before = -1
        with torch.inference_mode(), row_scales():
            while before != len(self._left):  # some take what others give
                before = len(self._left)
                self._left = [work for work in self._left if not self._done(work, held)]
        wanted = {name for work in self._left for name in work.weights}
        self._held = {name: tensor for name, tensor in held.items() if name in wanted}

    def finish(self) -> None:
        """Raises PassError if a weight never came."""
        for work in self._left:
            if missing := sorted(work.weights - self._held.keys()):
                raise PassError(
                    f"component {self._component}: a table is made of the weight {missing[0]}, which the passes left "
                    "without data"
                )

    def _done(self, work: _Work, held: Weights) -> bool:
        """Evaluates an operation for every evaluation. Returns False if something that it takes is not there yet."""
        if not work.weights <= held.keys() or not work.is_ready(self._waiting):
            return False
        for key, tensor in work.run(held, self._constants):
            self._constants.fill(key, tensor)
            self._waiting.discard(key)
        return True


class _Values:
    """The values of one evaluation so far."""

    def __init__(self, fold: Fold, each: Evaluation) -> None:
        self.keys = dict(zip((item.name for item in fold.program.inputs), each.takes, strict=True))
        self.gives = dict(zip((ref.name for ref in fold.program.outputs), each.gives, strict=True))
        self.known: dict[str, torch.Tensor] = {}

    def has(self, name: str, waiting: Collection[str]) -> bool:
        return name in self.known or (name in self.keys and self.keys[name] not in waiting)

    def get(self, name: str, constants: Constants) -> torch.Tensor:
        return self.known[name] if name in self.known else constants.tensors[self.keys[name]]


def _values_of(fold: Fold) -> list[_Values]:
    return [_Values(fold, each) for each in fold.evaluations]


def _positions(fold: Fold) -> range:
    return range(len(fold.program.ops))


class _Work:
    """One operation of a fold, for all its evaluations.

    Attributes:
        weights: the names of those that it reads.
    """

    def __init__(self, fold: Fold, at: int, values: Sequence[_Values]) -> None:
        op, self._values = fold.program.ops[at], values
        self._part = split_off(fold.program, [at], op.results)
        self._now: tuple[Weights, Weights] = ({}, {})
        self._run = Interpreter(self._part, _CPU, {REGION: lambda op: self._region(fold, op), ATTENTION: packaged})
        inside = fold.regions[op.attrs["region"]].weights if op.name == REGION else ()
        self.weights = frozenset(self._part.weights) | {weight_in(op, name) for name in inside}

    def is_ready(self, waiting: Collection[str]) -> bool:
        """Returns True if the values that it takes are there, in every evaluation."""
        return all(each.has(item.name, waiting) for each in self._values for item in self._part.inputs)

    def run(self, weights: Weights, constants: Constants) -> list[tuple[str, torch.Tensor]]:
        """Returns the constants that are known then, by their keys."""
        self._now = weights, constants.tensors
        filled: list[tuple[str, torch.Tensor]] = []
        for each in self._values:
            args = [each.get(item.name, constants) for item in self._part.inputs]
            results = self._run(args, weights, constants.tensors)
            for ref, tensor in zip(self._part.outputs, results, strict=True):
                each.known[ref.name] = tensor
                if ref.name in each.gives:
                    filled.append((each.gives[ref.name], tensor))
        return filled

    def _region(self, fold: Fold, op: Op) -> Callable[..., Sequence[torch.Tensor]]:
        inner = Interpreter(fold.regions[op.attrs["region"]], _CPU, {ATTENTION: packaged})
        return lambda *inputs: inner(inputs, *self._now, weight_in(op, ""))
