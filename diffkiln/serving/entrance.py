"""What every request passes first and last: its id, its token, limits on what it sends, a log line, a count."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from typing import Any

from starlette.routing import compile_path

from diffkiln.guards.printable import get_logger
from diffkiln.serving.metrics import Metrics
from diffkiln.serving.refusals import Refusal
from diffkiln.serving.settings import Settings

log = get_logger(__name__)

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

#: Paths that need a token, where there are tokens: what costs something, and what tells something.
_GUARDED = re.compile(r"/v1(/|$)|/metrics$")
#: Asked so often that they are logged for debugging only.
_PROBES = ("/health", "/ready", "/metrics")
_IDENTITY = re.compile(r"[A-Za-z0-9._-]{1,64}")
_FORM = "multipart/form-data"
#: The status that is logged, as nginx does, of a client that left before its answer.
LEFT = 499
#: Seconds and bytes for which a client may go on sending after it was refused.
_LINGER = 2.0
_DISCARDED = 1 << 24
#: Bytes of a body that are read even if its request is refused.
_SMALL = 1 << 14
_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"cache-control", b"no-store"),
    (b"referrer-policy", b"no-referrer"),
)


class Entrance:
    """ASGI middleware around the whole application.

    Args:
        app: The application; it finds the request's id in the state of its scope.
        settings: Limits and tokens.
        metrics: Told of every answer.
        routes: The paths that are counted by name, such as "/v1/videos/{video_id}".
        check_room: Raises `Refusal` if whatever is posted to a path would be refused now, before anything is read.
    """

    def __init__(
        self,
        app: App,
        settings: Settings,
        metrics: Metrics,
        routes: frozenset[str],
        check_room: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._check_room = check_room
        self._app, self._settings, self._metrics, self._routes = app, settings, metrics, routes
        self._patterns = [(path, compile_path(path)[0]) for path in sorted(routes) if "{" in path]
        self._receiving = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        visit = _Visit(scope, receive, send)
        body = _Body(self, receive, visit)
        try:
            self._admit(visit)
            if visit.method == "POST":
                await self._check(visit, body)
            await self._app(scope, body.receive, visit.send)
        except Refusal as refusal:
            await visit.refuse(refusal)
        except Exception as error:
            log.exception("request %s failed: %s", visit.identity, type(error).__name__)
            await visit.refuse(Refusal(500, "internal fault; the server's log has the reason"))
        finally:
            body.release()
            self._note(visit)

    def _admit(self, visit: _Visit) -> None:
        """Refuses a request by its head alone."""
        if _GUARDED.match(visit.path) and self._settings.tokens:
            scheme, _, token = visit.header("authorization").partition(" ")
            if scheme.lower() != "bearer" or not self._settings.admits(token.strip()):
                raise Refusal(401, "no valid token. Send the header `Authorization: Bearer TOKEN`")
        if visit.method == "POST" and visit.header("sec-fetch-site") in ("cross-site", "same-site"):
            raise Refusal(403, "a page of another site sent this. Call the server from a program, or from its own page")
        length = visit.header("content-length")
        if length.isdecimal() and int(length) > self.allowed(visit):
            raise self._too_large(visit)

    async def _check(self, visit: _Visit, body: _Body) -> None:
        """Refuses a request for which there is no room. A small body is taken, so that its connection stays."""
        try:
            self._check_room(visit.path)
        except Refusal:
            length = visit.header("content-length")
            while length.isdecimal() and int(length) <= _SMALL and not visit.whole and not visit.gone:
                await body.receive()
            raise

    def allowed(self, visit: _Visit) -> int:
        """Returns the size of a body that may come with this head."""
        form = visit.header("content-type").lower().startswith(_FORM)
        return self._settings.upload_bytes if form else self._settings.body_bytes

    def count(self, visit: _Visit, received: int, more: int) -> None:
        """Counts bytes of a body. Raises `Refusal` if they are too many: of this request, or of all together."""
        self._receiving += more
        if received > self.allowed(visit):
            raise self._too_large(visit)
        if self._receiving > self._settings.bodies_bytes:
            raise Refusal(503, "the server is receiving too much at once. Try again", retry_after=1)

    def release(self, received: int) -> None:
        """Forgets bytes of a body that is dealt with."""
        self._receiving -= received

    @property
    def body_seconds(self) -> float:
        return self._settings.body_seconds

    def _too_large(self, visit: _Visit) -> Refusal:
        return Refusal(413, f"the body has more than the {self.allowed(visit):,} bytes that are accepted. Send less")

    def _note(self, visit: _Visit) -> None:
        seconds = time.monotonic() - visit.started
        route = self._route(visit.path)
        self._metrics.answered(route, visit.status)
        if route.startswith("/v1/"):
            self._metrics.phase("request", seconds)
        fields = {"request": visit.identity, "status": visit.status, "seconds": round(seconds, 4)}
        level = logging.DEBUG if route in _PROBES else logging.INFO
        log.log(level, "%s %s", visit.method, visit.path, extra={"fields": fields})

    def _route(self, path: str) -> str:
        if path in self._routes:
            return path
        return next((route for route, pattern in self._patterns if pattern.match(path)), "other")


class _Visit:
    """One request and its answer."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._receive, self._send = receive, send
        self._headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        self.method, self.path, self.started = scope["method"], scope["path"], time.monotonic()
        given = self.header("x-request-id")
        self.identity = given if _IDENTITY.fullmatch(given) else secrets.token_hex(8)
        scope.setdefault("state", {})["request_id"] = self.identity
        self.status = LEFT
        self.whole = self.gone = False

    def header(self, name: str) -> str:
        return self._headers.get(name, "")

    @property
    def unread(self) -> bool:
        """Returns True if a part of the body may still come."""
        announced = self.header("content-length") not in ("", "0") or self.header("transfer-encoding") != ""
        return announced and not self.whole

    async def send(self, message: Message) -> None:
        """Sends a part of the answer, with the headers that all answers have.

        An answer that does not wait for its body ends once the client has sent it: see `_discard`.
        """
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = [*message.get("headers", ()), *_HEADERS, (b"x-request-id", self.identity.encode())]
            if self.unread:
                headers.append((b"connection", b"close"))  # the rest of the body is not worth reading
            message["headers"] = headers
        elif self.unread and not message.get("more_body", False):
            await self._send({**message, "more_body": True})
            await _discard(self._receive)
            message = {"type": "http.response.body", "body": b""}
        await self._send(message)

    async def refuse(self, refusal: Refusal) -> None:
        """Answers with a refusal, unless an answer has begun."""
        if self.status != LEFT:
            return
        data = json.dumps(refusal.body).encode()
        headers = {"content-type": "application/json", "content-length": str(len(data)), **refusal.headers}
        rows = [(name.encode(), value.encode()) for name, value in headers.items()]
        await self.send({"type": "http.response.start", "status": refusal.status, "headers": rows})
        await self.send({"type": "http.response.body", "body": data if self.method != "HEAD" else b""})


async def _discard(receive: Receive) -> None:
    """Takes the rest of a body, for some time and up to some size.

    A connection that is closed on unread bytes is reset, and the client may lose the answer that it has not read yet.
    """
    rest = _DISCARDED
    with suppress(TimeoutError):
        async with asyncio.timeout(_LINGER):
            while rest > 0:
                message = await receive()
                rest -= len(message.get("body", b""))
                if not message.get("more_body", False):  # its end, or the client's
                    return


class _Body:
    """The body of a request on its way in: counted, and in time."""

    def __init__(self, entrance: Entrance, receive: Receive, visit: _Visit) -> None:
        self._entrance, self._receive, self._visit = entrance, receive, visit
        self._received = 0

    async def receive(self) -> Message:
        """Gives the next part. Raises `Refusal` for too much of it, or too late."""
        if self._visit.whole:
            return await self._receive()
        rest = self._visit.started + self._entrance.body_seconds - time.monotonic()
        try:
            message = await asyncio.wait_for(self._receive(), rest)
        except TimeoutError:
            raise Refusal(408, f"the body did not come within {self._entrance.body_seconds:g} seconds") from None
        if message["type"] == "http.request":
            more = len(message.get("body", b""))
            self._received += more
            self._entrance.count(self._visit, self._received, more)
            self._visit.whole = not message.get("more_body", False)
        else:
            self._visit.gone = True
        return message

    def release(self) -> None:
        """Forgets the body."""
        self._entrance.release(self._received)
        self._received = 0
