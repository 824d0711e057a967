"""The routes of jobs for videos: `/v1/videos` as OpenAI's video API has it."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Query, Request, Response

from diffkiln.serving.files import MEDIA_TYPES
from diffkiln.serving.offer import Offer, size_of
from diffkiln.serving.openapi import ERRORS
from diffkiln.serving.orders import Event, Order
from diffkiln.serving.video_jobs import Deleted, Video, VideoJobs, Videos

PATH = "/v1/videos"
_MOST_LISTED = 100


class VideoRoutes:
    """The routes under `/v1/videos`.

    Args:
        jobs: The jobs.
        read: Checks a request, and returns its order, the bundle that it is for, and the fields of its body.
        carry_out: Begins to carry out an order.
        tokens: Whether clients have tokens, each of which sees its own jobs only.
    """

    def __init__(
        self,
        jobs: VideoJobs,
        read: Callable[[Request], Awaitable[tuple[Order, Offer, Any]]],
        carry_out: Callable[[Offer, Order], AsyncIterator[Event]],
        tokens: bool,
    ) -> None:
        self._jobs, self._read, self._carry_out, self._tokens = jobs, read, carry_out, tokens

    def add(self, api: FastAPI, body: dict[str, Any]) -> None:
        """Adds the routes.

        Args:
            api: To which.
            body: The body of a request for a job, as the OpenAPI document has it.
        """
        one = f"{PATH}/{{video_id}}"
        extra = {"requestBody": body}
        asked = {"response_model": Video, "responses": ERRORS}
        files: dict[int | str, dict[str, Any]] = {
            200: {"content": {kind: {} for kind in _KINDS}, "description": "The file."},
            **ERRORS,
        }
        api.post(PATH, summary="Ask for a video", operation_id="create_video", openapi_extra=extra, **asked)(
            self.create
        )
        api.get(PATH, summary="List videos", response_model=Videos, responses=ERRORS)(self.listed)
        api.get(one, summary="Tell how far a video is", **asked)(self.retrieve)
        api.delete(one, summary="Delete a video, or stop its job", response_model=Deleted, responses=ERRORS)(
            self.delete
        )
        api.get(f"{one}/content", summary="Fetch a video", response_class=Response, responses=files)(self.content)

    async def create(self, request: Request) -> Video:
        """Takes an order as a job."""
        order, offer, _ = await self._read(request)
        choice = offer.choose(order.asked, "negative_prompt" in order.prompts)
        order = replace(order, watched=True)
        events, owner = self._carry_out(offer, order), self._owner(request)
        size = size_of(choice.keywords) or "auto"
        return await self._jobs.add(order, events, owner, offer.name, size, _shown(choice.frames / order.fps))

    async def listed(
        self,
        request: Request,
        after: str | None = None,
        limit: Annotated[int, Query(ge=1, le=_MOST_LISTED)] = 20,
        order: Literal["asc", "desc"] = "desc",
    ) -> Videos:
        """Lists the jobs of a client."""
        return self._jobs.listed(self._owner(request), after, limit, order == "desc")

    async def retrieve(self, request: Request, video_id: str) -> Video:
        """Tells of one job."""
        return self._jobs.get(video_id, self._owner(request)).shown

    async def delete(self, request: Request, video_id: str) -> Deleted:
        """Forgets a job, and gives it up if it has not ended."""
        return await self._jobs.delete(video_id, self._owner(request))

    async def content(self, request: Request, video_id: str, variant: Literal["video"] = "video") -> Response:
        """Gives the file of a completed job."""
        job = self._jobs.content(video_id, self._owner(request))
        ending = job.shown.output_format
        headers = {"content-disposition": f'attachment; filename="{video_id}.{ending}"'}
        return Response(job.data, media_type=MEDIA_TYPES[ending], headers=headers)

    def _owner(self, request: Request) -> bytes:
        """Returns what tells a client's jobs from those of others: its token's digest, where there are tokens."""
        given = request.headers.get("authorization", "") if self._tokens else ""
        return hashlib.sha256(given.partition(" ")[2].strip().encode("utf-8", "surrogateescape")).digest()


_KINDS = sorted({MEDIA_TYPES[ending] for ending in ("mp4", "gif", "webp")})


def _shown(seconds: float) -> str:
    return f"{seconds:.2f}".rstrip("0").rstrip(".")
