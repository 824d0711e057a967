"""Who makes the trials of `tune`: this process, one after the other, or the nodes of a Ray cluster, side by side."""

from __future__ import annotations

import logging
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from diffkiln.errors import MissingDependency, SystemRefused
from diffkiln.evaluate.machine import machine
from diffkiln.evaluate.trials import Goal, Outcome, Workshop
from diffkiln.exporters.cache import EngineCache
from diffkiln.guards.printable import get_logger

log = get_logger(__name__)

#: Seconds for which a node may be busy with something else before it is left out.
_PATIENCE = 60.0
_KNOCK = 10.0
#: What must be equal for numbers to compare.
_COMPARED = ("processor", "gpu", "versions")


class Crew(Protocol):
    """Makers of trials.

    Attributes:
        capacity: how many trials may run at once.
        machine: where they run, as words.
    """

    @property
    def capacity(self) -> int: ...

    @property
    def machine(self) -> Mapping[str, str]: ...

    def begin(self, spec: Mapping[str, Any], goal: Goal) -> Any:
        """Begins a trial of a plain spec. Returns what `first` knows it by."""
        ...

    def first(self, works: Sequence[Any]) -> tuple[Any, Outcome | None]:
        """Waits until one of the trials ends. Returns it and its outcome; None where the node died that made it."""
        ...


class Alone:
    """This process; the trials use its folder."""

    capacity = 1

    def __init__(self, workshop: Workshop) -> None:
        self._workshop = workshop
        self.machine: Mapping[str, str] = machine()

    def begin(self, spec: Mapping[str, Any], goal: Goal) -> Callable[[], Outcome]:
        """Returns the trial, which `first` makes."""
        return lambda: self._workshop.outcome(spec, goal)

    def first(self, works: Sequence[Callable[[], Outcome]]) -> tuple[Callable[[], Outcome], Outcome]:
        """Makes the first trial."""
        return works[0], works[0]()


class Hand:
    """The maker of trials on one node of a cluster.

    Args:
        base: the folder that the spec's paths start from, the same on every node.
        reference: as `Workshop` has it.
    """

    def __init__(self, base: str, reference: str | None) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="diffkiln-tune-"))
        self._base, self._reference = Path(base), None if reference is None else Path(reference)

    def about(self) -> tuple[Mapping[str, str], bool]:
        """Returns what the node is, and whether it has the folder."""
        return machine(), self._base.is_dir()

    def outcome(self, spec: Mapping[str, Any], goal: Goal) -> Outcome:
        """Returns what a trial comes to."""
        return Workshop(self._folder, self._base, self._reference, EngineCache(), lambda _: None).outcome(spec, goal)

    def close(self) -> None:
        """Removes the node's bundle and pictures."""
        shutil.rmtree(self._folder, ignore_errors=True)


class Cluster:
    """The nodes of a Ray cluster. A trial has a node to itself, or one GPU of it, so that times are its own.

    Args:
        hands: actors of `Hand`, as Ray knows them.
    """

    def __init__(self, hands: Sequence[Any], facts: Mapping[str, str]) -> None:
        self._idle, self._busy = list(hands), {}
        self.machine = facts

    @property
    def capacity(self) -> int:
        return len(self._idle) + len(self._busy)

    def begin(self, spec: Mapping[str, Any], goal: Goal) -> Any:
        """Begins a trial on an idle node."""
        hand = self._idle.pop()
        work = hand.outcome.remote(dict(spec), goal)
        self._busy[work] = hand
        return work

    def first(self, works: Sequence[Any]) -> tuple[Any, Outcome | None]:
        """Waits until one of the trials ends.

        Raises:
            SystemRefused: no node is left; or one has no room on its disk, which would end every trial.
        """
        import ray
        from ray.exceptions import RayActorError, RayTaskError

        (work,), _ = ray.wait(list(works), num_returns=1)
        hand = self._busy.pop(work)
        try:
            outcome = ray.get(work)
        except RayTaskError as error:
            self._idle.append(hand)
            raise (error.cause if isinstance(error.cause, SystemRefused) else error) from None
        except RayActorError as error:
            log.warning("a node of the cluster was lost, and its trial is made again: %s", error)
            if not self.capacity:
                raise SystemRefused("the last node of the Ray cluster was lost. The same command goes on") from None
            return work, None
        self._idle.append(hand)
        return work, outcome


@contextmanager
def cluster(address: str, base: Path, reference: Path | None, gpu: bool) -> Iterator[Cluster]:
    """Gives the nodes of a Ray cluster inside the `with` block.

    Args:
        address: of the cluster, such as "auto" or "ray://host:10001".
        base, reference: as `Workshop` has them; the same paths on every node.
        gpu: whether each trial needs a GPU.

    Raises:
        MissingDependency: Ray is not installed.
        SystemRefused: there is no cluster, no node is free, nodes differ, or one lacks the folder.
    """
    import importlib.util

    if importlib.util.find_spec("ray") is None:
        raise MissingDependency("trials on a cluster need Ray: pip install 'diffkiln[ray]'")
    import ray

    _connect(address)
    hands: list[Any] = []
    try:
        hands = _hired(base, reference, gpu)
        ready, facts = _ready(hands, base)
        yield Cluster(ready, facts)
        ray.get([hand.close.remote() for hand in ready], timeout=_PATIENCE)
    finally:
        for hand in hands:
            ray.kill(hand)
        ray.shutdown()


def _connect(address: str) -> None:
    import ray

    try:
        _knock(address)
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise SystemRefused(
            f"there is no Ray cluster at {address}: {reason}. Start one with `ray start --head`, or name its address"
        ) from None


def _knock(address: str) -> None:
    """Raises `OSError` if nobody listens: Ray itself would go on trying for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=_KNOCK).close()


def _hired(base: Path, reference: Path | None, gpu: bool) -> list[Any]:
    """Returns an actor for each node, or for each GPU."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    maker, made = ray.remote(Hand), []
    for node in ray.nodes():
        cores, gpus = (int(node["Resources"].get(name, 0)) for name in ("CPU", "GPU"))
        if not node["Alive"] or cores < 1 or (gpu and gpus < 1):
            continue
        capacity = gpus if gpu else 1
        wanted = {"num_cpus": max(1, cores // capacity), "num_gpus": 1 if gpu else 0}
        stays = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        hire = maker.options(scheduling_strategy=stays, **wanted)
        made += [hire.remote(str(base), None if reference is None else str(reference)) for _ in range(capacity)]
    if not made:
        raise SystemRefused(f"no node of the Ray cluster has a {'GPU' if gpu else 'core'} to give. Add one")
    return made


def _ready(hands: Sequence[Any], base: Path) -> tuple[list[Any], Mapping[str, str]]:
    """Returns the actors whose nodes are free, and the machine that all of them are."""
    import ray
    from ray.exceptions import RayError

    asked = {hand.about.remote(): hand for hand in hands}
    done, _ = ray.wait(list(asked), num_returns=len(asked), timeout=_PATIENCE)
    try:
        found = [ray.get(item) for item in done]
    except RayError as error:
        raise SystemRefused(
            f"a node of the Ray cluster cannot begin: {error}. Install diffkiln there, of the same version"
        ) from None
    if not found:
        raise SystemRefused(f"no node of the Ray cluster was free within {_PATIENCE:.0f} s. Try again later")
    if not all(has for _, has in found):
        raise SystemRefused(f"a node of the Ray cluster has no folder {base}. Put the spec where all nodes see it")
    kinds = {tuple(facts[name] for name in _COMPARED) for facts, _ in found}
    if len(kinds) > 1:
        several = "; ".join(", ".join(kind) for kind in sorted(kinds))
        raise SystemRefused(f"the nodes of the Ray cluster differ, so their numbers would not compare: {several}")
    return [asked[item] for item in done], found[0][0]
