"""HTTP connections that wait for nobody for ever: uvicorn has no limits for slow heads and slow readers."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from diffkiln.serving.settings import Settings

#: Bytes of a request's head.
MAX_HEAD = 64 << 10


def protocol_for(settings: Settings) -> type[HttpToolsProtocol]:
    """Returns uvicorn's protocol with these limits of time."""
    limits = {"head_seconds": settings.head_seconds, "stall_seconds": settings.stall_seconds}
    return type("PatientProtocol", (_Patient,), limits)


class _Patient(HttpToolsProtocol):
    """Ends a connection whose head does not come, is too long, or whose client takes nothing of its answer."""

    head_seconds = 10.0
    stall_seconds = 60.0
    _head: asyncio.TimerHandle | None = None
    _stall: asyncio.TimerHandle | None = None
    _head_bytes = 0

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._await_head()

    def data_received(self, data: bytes) -> None:
        if self._head is None and (self.cycle is None or self.cycle.response_complete):
            self._await_head()
        self._head_bytes += len(data)
        super().data_received(data)
        if self._head is not None and self._head_bytes > MAX_HEAD:
            self._refuse(b"431 Request Header Fields Too Large")

    def on_headers_complete(self) -> None:
        self._head = _stopped(self._head)
        super().on_headers_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._head_bytes = 0

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stall = self.loop.call_later(self.stall_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stall = _stopped(self._stall)

    def connection_lost(self, exc: Exception | None) -> None:
        self._head, self._stall = _stopped(self._head), _stopped(self._stall)
        super().connection_lost(exc)

    def _await_head(self) -> None:
        self._head_bytes = 0
        self._head = self.loop.call_later(self.head_seconds, self._refuse, b"408 Request Timeout")

    def _refuse(self, status: bytes) -> None:
        self._head = _stopped(self._head)
        if not self.transport.is_closing():
            if self._head_bytes:
                self.transport.write(b"HTTP/1.1 " + status + b"\r\nconnection: close\r\ncontent-length: 0\r\n\r\n")
            self.transport.close()


def _stopped(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
