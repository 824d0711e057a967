"""The trials of `tune` so far, in a file that survives the death of the process, and the choice of the next one.

<folder>/tuning.json    what is tuned, and where
<folder>/study.db       optuna's study, an SQLite file: every trial appears in it whole, or not at all
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffkiln.errors import MissingDependency
from diffkiln.evaluate.trials import Goal, Outcome
from diffkiln.spec.choices import Picks, active, combinations, count
from diffkiln.spec.tuning import Tuning

if TYPE_CHECKING:
    from optuna import Study


_OUTCOME = "outcome"
_SEED = 0
#: The sampler may name so many combinations that were tried before a random one takes their place.
_PATIENCE = 20


@dataclass(frozen=True)
class Trial:
    """A combination of choices that was tried.

    Attributes:
        number: from 1, in the order in which they were tried.
        picks: the choices that count.
        outcome: what it came to.
    """

    number: int
    picks: Picks
    outcome: Outcome


class Trials:
    """The trials of one tuning. All combinations are tried in turn if there are not more than are asked for."""

    def __init__(self, study: Study, tuning: Tuning, goal: Goal, most: int) -> None:
        self._study, self._tuning, self._goal = study, tuning, goal
        self._size = count(tuning.data)
        self._grid = self._size <= most
        self._most = min(most, self._size)
        self._random = random.Random(_SEED)
        self._running: list[Asked] = []
        self._distributions = _distributions(tuning)
        self._end_killed()

    def __iter__(self) -> Iterator[Trial]:
        ended = [trial for trial in self._study.get_trials(deepcopy=False) if _OUTCOME in trial.user_attrs]
        for number, trial in enumerate(ended, 1):
            yield Trial(number, self._active(trial.params), Outcome(**trial.user_attrs[_OUTCOME]))

    @property
    def left(self) -> int:
        """Returns how many are still to be begun."""
        return max(0, self._most - self.begun)

    @property
    def begun(self) -> int:
        """Returns how many have ended or are running."""
        return len(list(self)) + len(self._running)

    def begin(self) -> Asked:
        """Returns the next combination. It is running until `end` or `drop`; several may be."""
        asked = self._ask()
        self._running.append(asked)
        return asked

    def end(self, asked: Asked, outcome: Outcome) -> None:
        """Keeps what a combination came to."""
        self._running.remove(asked)
        asked.trial.set_user_attr(_OUTCOME, outcome.as_json())
        self._tell(asked.trial, outcome)

    def drop(self, asked: Asked) -> None:
        """Forgets that a combination was begun, so that it is tried again."""
        from optuna.trial import TrialState

        self._running.remove(asked)
        self._study.tell(asked.trial, state=TrialState.FAIL)

    def _tell(self, trial: Any, outcome: Outcome) -> None:
        """Tells the sampler: a combination that does not keep the limits is as bad as one that is refused."""
        from optuna.trial import TrialState

        if outcome.end == "kept":
            self._study.tell(trial, outcome.measures[self._goal.objective])
        else:
            self._study.tell(trial, state=TrialState.PRUNED)

    def _end_killed(self) -> None:
        """Ends the trials that were running when their process died, so that their combinations are tried again."""
        from optuna.trial import TrialState

        for trial in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING, TrialState.WAITING)):
            if trial.state == TrialState.WAITING:  # named, and not begun
                trial = self._study.ask(self._distributions)
            if found := trial.user_attrs.get(_OUTCOME):
                self._tell(trial.number, Outcome(**found))
            else:
                self._study.tell(trial.number, state=TrialState.FAIL)

    def _ask(self) -> Asked:
        tried = [trial.picks for trial in (*self, *self._running)]
        if self._grid:
            return self._named(next(picks for picks in combinations(self._tuning.data) if picks not in tried))
        from optuna.trial import TrialState

        for _ in range(_PATIENCE):
            trial = self._study.ask(self._distributions)
            picks = self._active(trial.params)
            if picks not in tried:
                return Asked(trial, picks)
            self._study.tell(trial, state=TrialState.FAIL)
        return self._named(self._untried(tried))

    def _untried(self, tried: list[Picks]) -> Picks:
        """Returns a random combination that was not tried; there is one, since not all are to be tried."""
        while True:
            params = {name: self._random.randrange(_length(kind)) for name, kind in self._distributions.items()}
            if (picks := self._active(params)) not in tried:
                return picks

    def _named(self, picks: Picks) -> Asked:
        """Asks for these picks; a choice that does not count has its first value."""
        self._study.enqueue_trial({name: picks.get(name, 0) for name in self._distributions})
        return Asked(self._study.ask(self._distributions), picks)

    def _active(self, params: Mapping[str, Any]) -> Picks:
        return active(self._tuning.data, params)


@dataclass(frozen=True)
class Asked:
    """A combination that is to be tried: optuna's trial, and its picks."""

    trial: Any
    picks: Picks


@contextmanager
def opened(folder: Path, tuning: Tuning, goal: Goal, most: int) -> Iterator[Trials]:
    """Gives the trials in a folder, new or begun before, inside the `with` block.

    Raises:
        MissingDependency: optuna is not installed.
    """
    need_optuna()
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    storage = optuna.storages.RDBStorage(f"sqlite:///{folder.absolute() / 'study.db'}")
    try:
        study = optuna.create_study(
            study_name="tuning",
            storage=storage,
            sampler=optuna.samplers.TPESampler(seed=_SEED),
            direction="maximize" if goal.rises(goal.objective) else "minimize",
            load_if_exists=True,
        )
        yield Trials(study, tuning, goal, most)
    finally:
        storage.remove_session()
        storage.engine.dispose()


def need_optuna() -> None:
    """Checks that optuna is installed.

    Raises:
        MissingDependency: it is not.
    """
    from importlib.util import find_spec

    if find_spec("optuna") is None:
        raise MissingDependency("tune needs optuna: pip install 'diffkiln[tune]'")


def _distributions(tuning: Tuning) -> dict[str, Any]:
    """Returns optuna's distribution of the number that each choice has."""
    from optuna.distributions import CategoricalDistribution, IntDistribution

    found: dict[str, Any] = {}
    for choice in tuning.choices:
        last = len(choice.values) - 1
        kind = IntDistribution(0, last) if choice.ordered else CategoricalDistribution(tuple(range(last + 1)))
        found[choice.where] = kind
    return found


def _length(kind: Any) -> int:
    return len(kind.choices) if hasattr(kind, "choices") else kind.high + 1
