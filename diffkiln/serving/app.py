"""The application: routes over one or several services."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Route as StarletteRoute

from diffkiln.serving.entrance import LEFT, App, Entrance
from diffkiln.serving.events import close, stream
from diffkiln.serving.files import MEDIA_TYPES
from diffkiln.serving.forms import read_upload
from diffkiln.serving.loras import check_offered, offered
from diffkiln.serving.metrics import Metrics
from diffkiln.serving.offer import Choice, Offer, size_of
from diffkiln.serving.openapi import ERRORS, FORM, JSON, described
from diffkiln.serving.orders import Event, Finished, Order
from diffkiln.serving.page import page
from diffkiln.serving.refusals import Refusal, late
from diffkiln.serving.requests import ANSWERED_VIDEOS, Answer, Item, Models, body_for, model_of, order_of, read_json
from diffkiln.serving.service import Service
from diffkiln.serving.settings import Settings
from diffkiln.serving.video_jobs import VideoJobs
from diffkiln.serving.video_routes import PATH, VideoRoutes
from diffkiln.version import __version__


class Route(NamedTuple):
    """A way to make something.

    Attributes:
        path: Of HTTP.
        kind: How events are named.
        body: Model of the request.
        summary: For the OpenAPI document.
        offers: The bundles that can be asked for, by name.
        job: Whether the answer is a job, as OpenAI's for videos; requests may be forms then, as its client sends them.
    """

    path: str
    kind: str
    body: type[BaseModel]
    summary: str
    offers: Mapping[str, Offer]
    job: bool = False

    @property
    def takes(self) -> bool:
        """Returns True if requests bring images, and so are forms."""
        return any(offer.takes for offer in self.offers.values())


class Application:
    """The routes over the services by the name of their bundle.

    Args:
        services: By name; the first is meant where a request names none.
        settings: Limits and tokens.
        metrics: What `/metrics` shows.
        draining: Returns True once the server is about to stop.
        jobs: Whether this process takes jobs for videos: it is the only one that clients reach.
    """

    def __init__(
        self,
        services: Mapping[str, Service],
        settings: Settings,
        metrics: Metrics,
        draining: Callable[[], bool] = lambda: False,
        jobs: bool = True,
    ) -> None:
        self._services, self._settings, self._metrics, self._draining = services, settings, metrics, draining
        self.api = FastAPI(
            title="diffkiln", version=__version__, docs_url=None, redoc_url=None, openapi_url="/openapi.json"
        )
        self.api.add_exception_handler(Refusal, _answer_refusal)
        self.api.add_exception_handler(HTTPException, self._answer_http)
        self.api.add_exception_handler(RequestValidationError, _answer_invalid)
        self.api.add_exception_handler(Exception, _answer_fault)
        offers = [service.offer for service in services.values()]
        self.routes = routes_for(offers, settings)
        for route in self.routes:
            self._add(route)
        if jobs and (route := job_route(offers, settings)) is not None:
            self._add_jobs(route)
            self.routes.append(route)
        self._add_others()
        self._asked = {route.path: list(route.offers) for route in self.routes}

    def asgi(self) -> App:
        """Returns what a server runs: the routes behind the entrance."""
        paths = {getattr(route, "path", "") for route in self.api.routes}
        return Entrance(self.api, self._settings, self._metrics, frozenset(paths), self._check_room)

    def _check_room(self, path: str) -> None:
        """Raises `Refusal` if a request to make something would find no place, whatever it says.

        Under overload most requests are refused, and the less that costs, the more of the rest is made.
        """
        offers = self._asked.get(path)
        if offers is not None and len(offers) == 1:
            self._services[offers[0]].check_room()

    # -- routes --

    def _add(self, route: Route) -> None:
        async def make(request: Request) -> Response:
            return await self._make(request, route)

        shown = described(route.body, list(route.offers.values()))
        self.api.post(
            route.path,
            summary=route.summary,
            operation_id=route.kind,
            response_class=JSONResponse,
            responses={
                200: {"model": Answer, "content": {"text/event-stream": {}}},
                **ERRORS,
            },
            openapi_extra={"requestBody": shown},
        )(make)

    def _add_jobs(self, route: Route) -> None:
        jobs = VideoJobs(self._settings, partial(self._metrics.phase, "job"))

        def carry_out(offer: Offer, order: Order) -> AsyncIterator[Event]:
            return self._services[offer.name].carry_out(order)

        routes = VideoRoutes(jobs, partial(self._order, route=route), carry_out, bool(self._settings.tokens))
        routes.add(self.api, described(route.body, list(route.offers.values()), forms=True))

    def _add_others(self) -> None:
        get = self.api.get
        get("/v1/models", response_model=Models, responses=ERRORS, summary="List the bundles")(self._list)
        get("/health", responses=ERRORS, summary="Tell whether the process works")(self._health)
        get("/ready", responses=ERRORS, summary="Tell whether requests are answered")(self._ready)
        get("/metrics", include_in_schema=False)(self._numbers)
        drawn = {route.path: route.offers for route in self.routes if not route.job}
        html, headers = page(drawn, bool(self._settings.tokens))
        get("/", include_in_schema=False)(lambda: HTMLResponse(html, headers=headers))

    async def _list(self) -> Models:
        loras = offered(self._settings.loras) if self._settings.loras is not None else []
        return Models(data=[model_of(service.offer, loras) for service in self._services.values()])

    async def _health(self) -> dict[str, str]:
        if not all(service.healthy for service in self._services.values()):
            raise Refusal(500, "the pipeline's thread has ended. Start the server again")
        return {"status": "ok"}

    async def _ready(self) -> dict[str, str]:
        if self._draining():  # what has come is answered; what comes next goes to another server
            raise Refusal(503, "this server is shutting down", retry_after=1)
        self._refuse_unready(list(self._services))
        return {"status": "ok"}

    async def _numbers(self) -> Response:
        return Response(self._metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    def _refuse_unready(self, names: Sequence[str]) -> None:
        for name in names:
            if not self._services[name].ready:
                raise Refusal(503, f"{name} is not loaded yet. Try again in a moment", retry_after=2)

    # -- making --

    async def _make(self, request: Request, route: Route) -> Response:
        order, offer, checked = await self._order(request, route)
        events = self._services[offer.name].carry_out(order)
        ends = asyncio.get_running_loop().time() + self._settings.deadline
        await anext(events)  # it is accepted, or refused with a status of its own
        if order.watched:
            why = stream(route.kind, order, events, _size(order, offer), ends)
            return StreamingResponse(why, media_type="text/event-stream")
        finished = await _all(request, events, ends)
        return JSONResponse(_answer(order, finished, checked.response_format == "url", _size(order, offer)))

    async def _order(self, request: Request, route: Route) -> tuple[Order, Offer, Any]:
        """Returns what a request asks for, of which bundle, and its checked body. Raises `Refusal`."""
        try:
            checked, images, offer = await self._read(request, route)
        except ClientDisconnect:
            raise Refusal(LEFT, "the client left") from None
        order = order_of(checked, offer, request.state.request_id, images)
        if order.previews:
            _check_previews(order, offer)
        if self._settings.loras is not None:
            check_offered(self._settings.loras, order.lora)
        return order, offer, checked

    async def _read(self, request: Request, route: Route) -> tuple[Any, dict[str, tuple[Any, ...]], Offer]:
        def offer_for(checked: Any) -> Offer:
            offer = route.offers[checked.model or next(iter(route.offers))]
            self._refuse_unready([offer.name])
            return offer

        given = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        images: dict[str, tuple[Any, ...]] = {}
        forms = route.takes or route.job
        if given == FORM and forms:
            checked, images = await read_upload(request, route.body, offer_for, self._settings)
        elif given == JSON and not all(offer.takes for offer in route.offers.values()):
            checked = read_json(route.body, await request.body())
        else:
            raise Refusal(415, f"content-type: send {FORM if forms else JSON}")
        offer = offer_for(checked)
        if offer.takes and not images:
            raise Refusal(400, f"{offer.name} takes images: send {FORM}", "image")
        return checked, images, offer

    async def _answer_http(self, request: Request, error: Exception) -> Response:
        """Says in our form what Starlette refuses: paths and methods that are not there, and broken forms."""
        status = getattr(error, "status_code", 500)
        reason = str(getattr(error, "detail", "")) or "refused"
        if status == 404:
            reason = f"nothing is here. There is {', '.join(route.path for route in self.routes)}, and /openapi.json"
        headers = getattr(error, "headers", None)
        if status == 405:  # Starlette tells of one route, and a path may have several
            headers = {"allow": ", ".join(self._methods(request.url.path))}
        return JSONResponse(Refusal(status, reason).body, status, headers=headers)

    def _methods(self, path: str) -> list[str]:
        """Returns the methods that a path answers to."""
        routes = [route for route in self.api.routes if isinstance(route, StarletteRoute)]
        fitting = [route for route in routes if route.path == path]
        fitting = fitting or [route for route in routes if route.path_regex.match(path)]
        return sorted({method for route in fitting for method in route.methods or ()})


def routes_for(offers: Sequence[Offer], settings: Settings) -> list[Route]:
    """Returns the routes that these bundles are for."""
    videos = [offer for offer in offers if offer.videos]
    edits = [offer for offer in offers if offer.takes and not offer.videos]
    drawn = [offer for offer in offers if not offer.takes and not offer.videos]
    rows = (
        ("/v1/images/generations", "image_generation", "ImageRequest", "Make images", drawn),
        ("/v1/images/edits", "image_edit", "EditRequest", "Make images of images", edits),
        (ANSWERED_VIDEOS, "video_generation", "VideoRequest", "Make videos", videos),
    )
    return [
        Route(path, kind, body_for(fitting, settings, name), summary, {offer.name: offer for offer in fitting})
        for path, kind, name, summary, fitting in rows
        if fitting
    ]


def job_route(offers: Sequence[Offer], settings: Settings) -> Route | None:
    """Returns the route of jobs for videos; None if none of these bundles makes videos."""
    videos = [offer for offer in offers if offer.videos]
    if not videos:
        return None
    body = body_for(videos, settings, "VideoJobRequest", job=True)
    return Route(PATH, "video", body, "Ask for a video", {offer.name: offer for offer in videos}, job=True)


async def _all(request: Request, events: AsyncIterator[Event], ends: float) -> list[Finished]:
    """Waits for all images of an order, for the end of its time, or until the client leaves."""
    leaving = asyncio.ensure_future(_left(request))
    collecting = asyncio.ensure_future(_collect(events))
    try:
        rest = ends - asyncio.get_running_loop().time()
        await asyncio.wait({leaving, collecting}, timeout=rest, return_when=asyncio.FIRST_COMPLETED)
        if collecting.done():
            return collecting.result()
        raise Refusal(LEFT, "the client left") if leaving.done() else late()
    finally:
        for task in (leaving, collecting):
            task.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await task
        await close(events)


async def _collect(events: AsyncIterator[Event]) -> list[Finished]:
    found = [event async for event in events if isinstance(event, Finished)]
    return sorted(found, key=lambda item: item.index)


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _answer(order: Order, finished: Sequence[Finished], url: bool, size: str | None) -> dict[str, Any]:
    data = []
    for item in finished:
        text = base64.b64encode(item.data).decode()
        given = {"url": f"data:{MEDIA_TYPES[order.ending]};base64,{text}"} if url else {"b64_json": text}
        data.append(Item(seed=item.seed, **given))
    answer = Answer(created=int(time.time()), data=data, output_format=order.ending, size=size)
    return answer.model_dump(exclude_none=True)


def _size(order: Order, offer: Offer) -> str | None:
    return size_of(_choice(order, offer).keywords) or None


def _check_previews(order: Order, offer: Offer) -> None:
    if not order.watched:
        raise Refusal(400, 'partial_images: previews are events. Send "stream": true too', "partial_images")
    if reason := _choice(order, offer).unseen:
        why = f"partial_images: {offer.name} shows no step before the last, since {reason}. Leave it out"
        raise Refusal(400, why, "partial_images")


def _choice(order: Order, offer: Offer) -> Choice:
    return offer.choose(order.asked, "negative_prompt" in order.prompts)


async def _answer_refusal(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    return JSONResponse(error.body, error.status, headers=dict(error.headers))


async def _answer_invalid(request: Request, error: Exception) -> Response:
    """Says in our form what FastAPI refuses: parts of the address that are not as they should be."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    name = str(first["loc"][-1])[:40]
    return JSONResponse(Refusal(400, f"{name}: {first['msg']}", name).body, 400)


async def _answer_fault(request: Request, error: Exception) -> Response:
    return JSONResponse(Refusal(500, "internal fault; the server's log has the reason").body, 500)
