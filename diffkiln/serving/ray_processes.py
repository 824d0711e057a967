"""The processes of a bundle that run each call together, as one replica of Ray Serve.

The replica is the first of them. It starts the others as actors within its own placement group, so that all are on one
machine, each with its own share of it. A call goes to all of them, and the first one's result is given. The others end
with the replica that owns them.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from typing import Any

import ray
from ray.util import get_current_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from diffkiln.bundle import open_bundle
from diffkiln.errors import Incompatible, PeerLost
from diffkiln.hub import cached
from diffkiln.runtime.loading import load
from diffkiln.runtime.processes import mesh_of
from diffkiln.runtime.targets import fitting_targets

#: Arguments of a call that the first process alone is given.
_OWN = frozenset({"callback_on_step_end"})
#: Seconds that the other processes have to come to the end of a call after the first one.
_PATIENCE = 30.0
_ALONE = 1


def processes_of(path: str) -> int:
    """Returns how many processes run a bundle's calls together: one, where this machine does not have the bundle."""
    if not os.path.isdir(path):
        return _ALONE
    with open_bundle(path, ignore_signature=True) as bundle:
        mesh = mesh_of(bundle.manifest)
    return _ALONE if mesh is None else mesh.size


def require_processes(path: str, held: int) -> None:
    """Raises `Incompatible` if a bundle runs in another number of processes than a replica has."""
    if (size := processes_of(path)) != held:
        raise Incompatible(
            f'{path} runs in {size} process(es), and a replica has {held}. Say "processes": {size} in the options of '
            "the application"
        )


def fetched(path: str, device: str | None, engines: bool = True) -> str:
    """Returns a bundle's folder. One at the Hub is fetched once, with the engines of this machine or without any."""
    if not path.startswith("hf://"):
        return path
    return str(cached(path, lambda manifest: fitting_targets(manifest, device) if engines else ()))


def load_together(path: str, *, cpus: float, gpus: float, **options: Any) -> Any:
    """Loads a bundle in this replica, and in as many other processes as it runs in besides.

    Args:
        path: of the bundle.
        cpus, gpus: of each process.
        **options: of `load`.

    Raises:
        Incompatible: the replica has another number of processes than the bundle runs in.
    """
    path = fetched(path, options["device"])
    size = processes_of(path)
    group = get_current_placement_group()
    held = _ALONE if group is None else group.bundle_count
    require_processes(path, held)
    if group is None or size == _ALONE:
        return load(path, **options)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    actor: Any = ray.remote(Process)
    others = [
        actor.options(
            num_cpus=cpus,
            num_gpus=gpus,
            max_restarts=0,
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank),
        ).remote(path, environment(rank, size, port), options)
        for rank in range(1, size)
    ]
    os.environ.update(environment(0, size, port))
    loading = [other.load.remote() for other in others]
    pipe = load(path, **options)
    ray.get(loading)
    return Together(pipe, others)


def environment(rank: int, size: int, port: int) -> dict[str, str]:
    """Returns the variables of a process, as torchrun sets them. Ray shows each process its own GPU alone, as the
    first."""
    values = {"RANK": rank, "LOCAL_RANK": 0, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return {name: str(value) for name, value in values.items()}


class Process:
    """A process of several that is not the first: an actor, which is called as the first one is."""

    def __init__(self, path: str, variables: Mapping[str, str], options: Mapping[str, Any]) -> None:
        self._path, self._options = path, options
        os.environ.update(variables)

    def load(self) -> None:
        """Loads the bundle, and joins the others."""
        self._pipe = load(self._path, **self._options)

    def call(self, given: Mapping[str, Any]) -> None:
        """Makes a call, whose result the first process has as well."""
        self._pipe(**given)


class Together:
    """The pipeline of the first process, whose calls all processes make."""

    def __init__(self, pipe: Any, others: list[Any]) -> None:
        self._pipe, self._others = pipe, others

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pipe, name)

    def __call__(self, **given: Any) -> Any:
        """Makes a call in all processes.

        Raises:
            PeerLost: another process ended, or failed where this one did not.
        """
        shared = {name: value for name, value in given.items() if name not in _OWN}
        calls = [other.call.remote(shared) for other in self._others]
        result = self._pipe(**given)
        try:
            ray.get(calls, timeout=_PATIENCE)
        except Exception as error:
            reason = str(error).strip().splitlines()[-1][:200]
            raise PeerLost(f"another of {len(calls) + 1} processes failed: {reason}. Start all of them anew") from error
        return result

    def __enter__(self) -> Together:
        return self

    def __exit__(self, *_: object) -> None:
        self._pipe.close()
        for other in self._others:
            ray.kill(other)
