"""The same application on a Ray cluster: fronts that speak HTTP, and replicas that each own a pipeline.

A front checks requests and passes orders on; a replica batches them as one process does. An order names its seed, so a
front sends it again where a replica dies, and the client gets the image that it would have got.
"""

from __future__ import annotations

import asyncio
import functools
import os
import random
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, cast
from weakref import WeakKeyDictionary

from pydantic import BaseModel, ConfigDict, Field, field_validator
from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError

from diffkiln.errors import DiffkilnError, Incompatible, PeerLost
from diffkiln.guards.printable import get_logger
from diffkiln.serving.app import Application
from diffkiln.serving.entrance import App
from diffkiln.serving.logs import set_up
from diffkiln.serving.offer import Offer, read_offer
from diffkiln.serving.orders import Accepted, Event, Finished, Order, Preview
from diffkiln.serving.ray_metrics import RayMetrics
from diffkiln.serving.ray_processes import fetched, load_together, processes_of, require_processes
from diffkiln.serving.refusals import Refusal, late
from diffkiln.serving.service import LocalService
from diffkiln.serving.settings import Settings, read_tokens

log = get_logger(__name__)

#: What is raised when a replica is gone; its orders go to another.
_GONE = (RayActorError, ReplicaUnavailableError, DeploymentUnavailableError)
#: Seconds between two tries.
_PAUSE = 0.2
#: Processes of a replica, which are all on one machine.
MOST = 1024


class Options(BaseModel):
    """The way in which an application is spread over a cluster: the `args` of a Serve configuration.

    Attributes:
        bundles: Name → folder, which every machine of the cluster must have, or address at the Hub.
        replicas: Processes with a pipeline; a pair is the fewest and the most, between which load decides.
        fronts: Processes that speak HTTP.
        gpus: GPUs of a replica; a fraction shares one among several. Of a bundle for several processes: of each.
        cpus: CPUs of a replica, or of each of its processes.
        processes: Processes of a replica, which run each call together; by default as many as the bundle says, where
            the machine that deploys has it, else one.
        ongoing: Requests in a replica at once, those in its pipeline included.
        queue: Requests that wait before a front at most; those beyond get 429.
        loaded: Bundles that a replica holds at once, where there are several.
        window: Seconds that a request waits for others to share its call.
        deadline: Seconds that a request may take.
        images: Images that one request may ask for.
        drain_seconds: Seconds for running requests when a replica is stopped.
        tokens: File with bearer tokens, on every machine.
        allow_native: Load native code that was not built by this user.
        device: Where to run; the bundle's target by default.
        share_weights: Keep weights in a machine's memory once for all its replicas, on CPUs.
        log_json: Whether log lines are JSON.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    bundles: dict[str, str] = Field(min_length=1)
    replicas: int | tuple[int, int] = 1
    fronts: Annotated[int, Field(ge=1)] = 1
    gpus: Annotated[float, Field(ge=0)] = 0.0
    cpus: Annotated[float, Field(ge=0)] = 1.0
    processes: Annotated[int, Field(ge=1, le=MOST)] | None = None
    ongoing: Annotated[int, Field(ge=1)] = 16
    queue: Annotated[int, Field(ge=1)] = 64
    loaded: Annotated[int, Field(ge=1)] = 1
    window: Annotated[float, Field(ge=0)] = Settings.window
    deadline: Annotated[float, Field(gt=0)] = Settings.deadline
    images: Annotated[int, Field(ge=1)] = Settings.images
    drain_seconds: Annotated[float, Field(gt=0)] = Settings.drain_seconds
    tokens: str | None = None
    allow_native: bool = False
    device: str | None = None
    share_weights: bool = True
    log_json: bool = True

    @field_validator("replicas")
    @classmethod
    def _check_replicas(cls, replicas: int | tuple[int, int]) -> int | tuple[int, int]:
        least, most = (replicas, replicas) if isinstance(replicas, int) else replicas
        if not 0 <= least <= most or most < 1:
            raise ValueError("give 1 or more, or a pair, the fewest first; a pair may begin with 0")
        return replicas

    @field_validator("gpus")
    @classmethod
    def _check_gpus(cls, gpus: float) -> float:
        if gpus > 1:
            raise ValueError("a replica runs on one GPU: give 1, or a fraction, so that several replicas share one")
        return gpus

    def processes_of_replica(self) -> int:
        """Returns the number of processes that run each call together.

        Raises:
            Incompatible: a bundle for several processes is not alone, or a bundle that this machine has runs in another
                number of processes than the options say.
        """
        counts = {name: self._processes(path) for name, path in self.bundles.items()}
        several = [name for name, count in counts.items() if count > 1]
        if several and len(self.bundles) > 1:
            raise Incompatible(
                f"{several[0]} runs in {counts[several[0]]} processes, which a replica has for one bundle. Serve it in "
                "an application of its own"
            )
        return max(counts.values())

    def _processes(self, path: str) -> int:
        if self.processes is None:
            return processes_of(path)
        if os.path.isdir(path):
            require_processes(path, self.processes)
        return self.processes

    def settings(self, **changed: Any) -> Settings:
        """Returns the limits that one process keeps."""
        kept = {name: getattr(self, name) for name in ("window", "deadline", "images", "drain_seconds")}
        return Settings(**{**kept, "queue": max(self.queue, self.images), **changed})


class Held:
    """A service that Ray's multiplexing holds, and lets go of by its `__del__`."""

    def __init__(self, service: LocalService, metrics: RayMetrics) -> None:
        self.service, self._metrics = service, metrics

    def __del__(self) -> None:
        self.service.close()
        self._metrics.sample()


class Replica(ABC):
    """A process with a pipeline, or with several by turns. The first bundles are loaded before requests come."""

    def __init__(self, options: Options) -> None:
        set_up(options.log_json, "info")
        self._options = options
        # Ray holds what is beyond `ongoing`, so that this queue is never full.
        self._settings = options.settings(queue=options.ongoing * options.images)
        self._opened = WeakKeyDictionary[LocalService, RayMetrics]()
        self._first = {path: self._open(path) for path in list(options.bundles.values())[: options.loaded]}
        for path, service in self._first.items():
            _await_loaded(service, path)

    async def carry_out(self, order: Order) -> AsyncIterator[Event]:
        """Carries out an order with the bundle that its multiplexed model id names."""
        held = await self.held(serve.get_multiplexed_model_id())
        async for event in held.service.carry_out(order):
            yield event

    @abstractmethod
    async def held(self, path: str) -> Held:
        """Returns the service of a bundle, of which Ray keeps some (`replica_class`)."""

    async def opened(self, path: str) -> Held:
        """Loads a bundle, unless it was among the first."""
        service = self._first.pop(path, None)
        if service is None:
            service = self._open(path)
            await asyncio.to_thread(_await_loaded, service, path)
        return Held(service, self._opened[service])

    def check_health(self) -> None:
        """Raises an error if only a new process can help; Ray then starts one. Ray asks every few seconds."""
        for metrics in list(self._opened.values()):
            metrics.sample()
        if any(service.broken for service in self._opened):
            raise RuntimeError("the thread of a pipeline has ended")

    def _open(self, path: str) -> LocalService:
        options = self._options
        opening = functools.partial(
            load_together,
            path,
            cpus=options.cpus,
            gpus=options.gpus,
            allow_native=options.allow_native,
            device=options.device,
            share_weights=options.share_weights,
        )
        # While an application is updated, fronts of the old one still ask for its bundles.
        metrics = RayMetrics(next((name for name, known in options.bundles.items() if known == path), Path(path).name))
        service = LocalService(
            read_offer(fetched(path, options.device), Path(path).name), opening, self._settings, metrics
        )
        self._opened[service] = metrics
        service.start()
        return service


class Front:
    """A process that speaks HTTP; `Application` over replicas."""

    def __init__(self, options: Options, handle: Any) -> None:
        set_up(options.log_json, "info")
        tokens = read_tokens(Path(options.tokens)) if options.tokens else ()
        offers = [
            read_offer(fetched(path, options.device, engines=False), name) for name, path in options.bundles.items()
        ]
        services = {
            offer.name: RayService(offer, path, handle, options.deadline)
            for offer, path in zip(offers, options.bundles.values(), strict=True)
        }
        settings = options.settings(tokens=tokens)
        # A job is known to the front that took it, and the next request may reach another.
        self._application = Application(services, settings, RayMetrics(), jobs=options.fronts == 1)

    def __serve_build_asgi_app__(self) -> App:
        """Returns the application that Ray puts behind its proxies."""
        return self._application.asgi()


class RayService:
    """Replicas that carry out the orders of one bundle.

    Args:
        offer: What the bundle offers.
        path: Of the bundle.
        handle: Of the replicas.
        deadline: Seconds after which an order is not sent again.
    """

    ready = healthy = True

    def __init__(self, offer: Offer, path: str, handle: Any, deadline: float) -> None:
        self._offer, self._path, self._handle, self._deadline = offer, path, handle, deadline

    @property
    def offer(self) -> Offer:
        """Returns what may be asked for."""
        return self._offer

    def check_room(self) -> None:
        """Does nothing: whether there is room is known to Ray, which is asked with the order."""

    async def carry_out(self, order: Order) -> AsyncIterator[Event]:
        """Gives what a replica gives. Where it dies, another one draws the rest, from the same seeds."""
        ends = asyncio.get_running_loop().time() + self._deadline
        given: set[tuple[int, ...]] = set()
        accepted = False
        while True:
            try:
                async for event in self._events(order):
                    if isinstance(event, Accepted) and accepted:
                        continue
                    if isinstance(event, Finished | Preview):
                        key = (event.index, event.number) if isinstance(event, Preview) else (event.index,)
                        if key in given:
                            continue
                        given.add(key)
                    accepted = accepted or isinstance(event, Accepted)
                    yield event
                return
            except (*_GONE, PeerLost) as error:
                log.warning("a replica is gone (%s); request %s is sent again", type(error).__name__, order.request)
            if asyncio.get_running_loop().time() > ends:
                raise late()
            await asyncio.sleep(_PAUSE * (1 + random.random()))

    async def _events(self, order: Order) -> AsyncIterator[Event]:
        response = self._handle.options(stream=True, multiplexed_model_id=self._path).carry_out.remote(order)
        running = True
        try:
            async for event in response:
                yield event
            running = False
        except BackPressureError:
            running = False
            raise Refusal(429, "too many requests wait already. Try again in 1 s", retry_after=1) from None
        except (*_GONE, RayTaskError) as error:
            running = False
            raise _cause(error) from error
        finally:
            if running:  # nobody waits for it any more
                with suppress(Exception):
                    response.cancel()


def app(
    bundle: str | os.PathLike[str] | Mapping[str, str | os.PathLike[str]],
    **options: Any,
) -> serve.Application:
    """Returns a Ray Serve application over one bundle, or over several by name: `serve.run(app("bundle"))`.

    Args:
        bundle: A folder, or folders by the names that requests call them.
        **options: Fields of `Options`.
    """
    given = bundle if isinstance(bundle, Mapping) else {Path(bundle).name: bundle}
    return build(Options(bundles={name: _address(path) for name, path in given.items()}, **options))


def build(args: Options) -> serve.Application:
    """Returns a Ray Serve application; what a Serve configuration names as its `import_path`."""
    replica = cast(serve.Deployment, serve.deployment(replica_class(args.loaded))).options(
        name="Replica",
        **_together(args),
        ray_actor_options={"num_cpus": args.cpus, "num_gpus": args.gpus},
        max_ongoing_requests=args.ongoing,
        max_queued_requests=args.queue,
        graceful_shutdown_timeout_s=args.drain_seconds,
        health_check_period_s=2,
        **_scale(args),
    )
    front = cast(serve.Deployment, serve.deployment(serve.ingress()(Front))).options(
        name="Front",
        num_replicas=args.fronts,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=Settings.connections,
        graceful_shutdown_timeout_s=args.drain_seconds,
    )
    return front.bind(args, replica.bind(args))


def replica_class(loaded: int) -> type[Replica]:
    """Returns the class of replicas that hold so many bundles at once."""

    class Multiplexed(Replica):
        @serve.multiplexed(max_num_models_per_replica=loaded)
        async def held(  # pyright: ignore[reportIncompatibleMethodOverride]
            self, path: str
        ) -> Held:
            return await self.opened(path)

    return Multiplexed


def _together(args: Options) -> dict[str, Any]:
    """Returns the place of a replica whose processes run each call together: one machine, a share for each of them."""
    size = args.processes_of_replica()
    if size == 1:
        return {}
    share = {name: amount for name, amount in (("CPU", args.cpus), ("GPU", args.gpus)) if amount}
    if not share:
        raise Incompatible(f"each of {size} processes has a share of its machine. Give cpus or gpus above 0")
    return {"placement_group_bundles": [share] * size, "placement_group_strategy": "STRICT_PACK"}


def _scale(args: Options) -> dict[str, Any]:
    if isinstance(args.replicas, int):
        return {"num_replicas": args.replicas}
    least, most = args.replicas
    # More is wanted as soon as replicas have half of what they may hold.
    target = max(1.0, args.ongoing / 2)
    scale = {"min_replicas": least, "max_replicas": most, "target_ongoing_requests": target}
    return {"autoscaling_config": scale}


def _address(path: str | os.PathLike[str]) -> str:
    text = os.fspath(path)
    return text if text.startswith("hf://") else str(Path(text).absolute())


def _await_loaded(service: LocalService, path: str) -> None:
    while not service.ready:
        if service.error is not None:
            raise service.error
        time.sleep(0.02)
    log.info("ready: %s is loaded", path)


def _cause(error: Exception) -> Exception:
    """Returns what was raised in the replica, or the error itself."""
    cause = error.cause if isinstance(error, RayTaskError) else None
    return cause if isinstance(cause, Refusal | DiffkilnError) else error
