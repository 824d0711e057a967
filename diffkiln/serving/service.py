"""What answers orders: a pipeline in this process. `ray.py` has the one that asks replicas."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

from diffkiln.errors import DiffkilnError, PeerLost
from diffkiln.serving.files import encode, preview_of
from diffkiln.serving.loras import Loras
from diffkiln.serving.metrics import Metrics
from diffkiln.serving.offer import Offer
from diffkiln.serving.orders import Accepted, Event, Failed, Finished, Job, JobEvent, Made, Order, Preview, Shown
from diffkiln.serving.refusals import refusal_of
from diffkiln.serving.settings import Settings
from diffkiln.serving.waiting import Queue
from diffkiln.serving.worker import Worker

#: Threads that write files; each holds one picture.
_ENCODERS = 2


class Service(Protocol):
    """The service that the application asks for images."""

    @property
    def offer(self) -> Offer:
        """Returns what may be asked for."""
        ...

    @property
    def ready(self) -> bool:
        """Returns True if orders are carried out now."""
        ...

    @property
    def healthy(self) -> bool:
        """Returns False if only a new process can help."""
        ...

    def check_room(self) -> None:
        """Raises `Refusal` if no order can be taken now, whatever it asks for."""
        ...

    def carry_out(self, order: Order) -> AsyncIterator[Event]:
        """Gives the files of an order, and its steps where it is watched. Closing the iterator gives the order up.

        Raises:
            Refusal: it cannot be carried out.
        """
        ...


class LocalService:
    """A pipeline in this process, in a thread of its own.

    Args:
        offer: What the bundle offers.
        load: Gives the pipeline.
        settings: Size of the queue, and the window.
        metrics: Told of everything.
        loaded: Called, in the pipeline's thread, when it is loaded, or with the error.
    """

    def __init__(
        self,
        offer: Offer,
        load: Callable[[], Any],
        settings: Settings,
        metrics: Metrics,
        loaded: Callable[[DiffkilnError | None], None] = lambda _: None,
    ) -> None:
        self._offer, self._metrics, self._closed = offer, metrics, False
        self._queue = Queue(settings.queue, settings.window)
        loras = None if settings.loras is None else Loras(settings.loras, settings.kept_loras)
        self._worker = Worker(load, self._queue, metrics, loaded, loras)
        self._encoders = ThreadPoolExecutor(_ENCODERS, "diffkiln-encode")
        metrics.gauge("queue_images", "Images that wait.", lambda: len(self._queue))
        metrics.gauge("running_images", "Images in the pipeline.", lambda: self._queue.running)
        metrics.gauge("weights_bytes", "Weights on the device.", self._weights)

    def start(self) -> None:
        """Begins to load the bundle."""
        self._worker.start()

    @property
    def offer(self) -> Offer:
        return self._offer

    @property
    def ready(self) -> bool:
        return self._worker.ready

    @property
    def healthy(self) -> bool:
        return self._worker.alive

    @property
    def error(self) -> DiffkilnError | None:
        """Returns why the bundle could not be loaded."""
        return self._worker.error

    @property
    def broken(self) -> bool:
        """Returns True if the pipeline's thread ended though nobody closed it."""
        return not self._closed and not self._worker.alive

    def check_room(self) -> None:
        """Does as `Service.check_room`."""
        self._queue.check()

    async def carry_out(self, order: Order) -> AsyncIterator[Event]:
        """Does as `Service.carry_out`."""
        loop, events = asyncio.get_running_loop(), asyncio.Queue[JobEvent]()

        def tell(event: JobEvent) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(events.put_nowait, event)

        job = Job(order, self._offer.choose(order.asked, "negative_prompt" in order.prompts), tell)
        self._queue.put(job)
        missing = order.count
        try:
            yield Accepted()
            while missing:
                event = await events.get()
                if isinstance(event, Failed):
                    if isinstance(event.error, PeerLost):  # the order can be carried out, but not here
                        raise event.error
                    raise refusal_of(event.error) from event.error
                if isinstance(event, Made):
                    missing -= 1
                    yield await loop.run_in_executor(self._encoders, self._finish, event, order)
                elif isinstance(event, Shown):
                    yield await loop.run_in_executor(self._encoders, self._show, event, order)
                else:
                    yield event
        finally:
            if missing:
                job.leave()
                self._queue.forget()

    def close(self, seconds: float = 10.0) -> None:
        """Runs what waits, closes the pipeline, and lets go of the threads."""
        self._closed = True
        self._queue.close()
        self._worker.join(seconds)
        self._encoders.shutdown(wait=False)

    def _finish(self, made: Made, order: Order) -> Finished:
        started = time.monotonic()
        data = encode(made.picture, order.ending, order.quality, order.fps)
        self._metrics.phase("encode", time.monotonic() - started)
        return Finished(made.index, made.seed, data)

    def _show(self, shown: Shown, order: Order) -> Preview:
        data = preview_of(shown.picture, order.ending, order.quality)
        return Preview(shown.index, shown.seed, shown.number, data)

    def _weights(self) -> float:
        return self._worker.pipe.executor.store.bytes_now if self._worker.pipe is not None else 0
