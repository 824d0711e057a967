"""One process: the application over a pipeline in a thread, served by uvicorn until SIGTERM."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn

from diffkiln.errors import DiffkilnError, SystemRefused
from diffkiln.guards.gate import gated
from diffkiln.guards.printable import get_logger
from diffkiln.serving.app import Application
from diffkiln.serving.metrics import Metrics
from diffkiln.serving.offer import Offer, read_offer
from diffkiln.serving.protocol import protocol_for
from diffkiln.serving.service import LocalService
from diffkiln.serving.settings import Settings

log = get_logger(__name__)

#: How long the pipeline's thread keeps Python's lock while requests wait for it. Python's own 5 ms, several times a
#: request, is what refusals would mostly consist of.
_SWITCH_SECONDS = 0.0005


class LocalServer:
    """Everything that serves one bundle in this process.

    Args:
        offer: What the bundle offers.
        load: Gives the pipeline; called in the pipeline's own thread.
        settings: Limits and tokens.
        alone: Whether the process does nothing else. What is loaded is then left out of Python's full collections,
            which hold up every request while they walk all of it.
    """

    def __init__(self, offer: Offer, load: Callable[[], Any], settings: Settings, alone: bool = False) -> None:
        self._settings, self._alone = settings, alone
        metrics = Metrics()
        self._service = LocalService(offer, load, settings, metrics, self._loaded)
        self.application = Application({offer.name: self._service}, settings, metrics, lambda: self._server.should_exit)
        config = uvicorn.Config(
            self.application.asgi(),
            http=protocol_for(settings),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            limit_concurrency=settings.connections,
            timeout_graceful_shutdown=max(1, round(settings.drain_seconds)),
        )
        self._server = _Server(config)
        self._error: DiffkilnError | None = None

    def run(self, listener: socket.socket) -> None:
        """Serves until SIGTERM or Ctrl-C, and then until the requests that are running are answered.

        Raises:
            DiffkilnError: the bundle cannot be loaded.
            KeyboardInterrupt: Ctrl-C ended it.
        """
        self._service.start()
        interval = sys.getswitchinterval()
        sys.setswitchinterval(_SWITCH_SECONDS)
        try:
            self._server.run(sockets=[listener])
        finally:
            sys.setswitchinterval(interval)
            if self._alone:
                gc.unfreeze()
            self._service.close()
        if self._error is not None:
            raise self._error
        if self._server.interrupted:
            raise KeyboardInterrupt

    def stop(self) -> None:
        """Begins to shut down, as SIGTERM does."""
        self._server.should_exit = True

    def _loaded(self, error: DiffkilnError | None) -> None:
        self._error = error
        if error is None:
            if self._alone:
                gc.collect()
                gc.freeze()
            log.info("ready: the bundle is loaded")
        else:
            self.stop()


class _Server(uvicorn.Server):
    """uvicorn's server, which ends by returning, whatever signal ended it."""

    interrupted = False

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        with contextlib.suppress(ValueError):  # only the main thread hears of signals
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, self.handle_exit)
        yield

    def handle_exit(self, sig: int, frame: Any) -> None:
        log.info("shutting down: running requests are answered first")
        self.interrupted = self.interrupted or sig == signal.SIGINT
        super().handle_exit(sig, frame)


def listen(host: str, port: int) -> socket.socket:
    """Returns a socket that listens; port 0 takes a free one.

    Raises:
        SystemRefused: the address is in use, or is none of this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(2048)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        reason = error.strerror or str(error)
        raise SystemRefused(f"cannot listen on {host} port {port}: {reason}. Choose another --host or --port") from None
    return listener


@gated()
def serve(
    bundle: str | os.PathLike[str],
    name: str,
    load: Callable[[], Any],
    settings: Settings,
    host: str = "127.0.0.1",
    port: int = 8000,
    listening: Callable[[str], None] = lambda _: None,
) -> None:
    """Serves a bundle until SIGTERM.

    Args:
        bundle: Its folder.
        name: What requests call it.
        load: Gives the pipeline; called in the thread that owns it.
        settings: Limits and tokens.
        host: Address to listen on.
        port: To listen on; 0 takes a free one.
        listening: Called with the address once connections are accepted.

    Raises:
        DiffkilnError: the bundle is refused, or the address is not to be had.
    """
    offer = read_offer(bundle, name)
    with listen(host, port) as listener:
        server = LocalServer(offer, load, settings, alone=True)
        shown = f"[{host}]" if ":" in host else host
        listening(f"http://{shown}:{listener.getsockname()[1]}")
        server.run(listener)
