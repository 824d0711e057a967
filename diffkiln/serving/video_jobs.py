"""Jobs for videos, as OpenAI's video API has them: asked for, looked at until they are done, fetched, deleted.

A job lives in the process that took it. Results are kept in memory for a while, and within bounds.
"""

from __future__ import annotations

import asyncio
import math
import secrets
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Literal

from pydantic import BaseModel, Field

from diffkiln.guards.printable import get_logger, printable
from diffkiln.serving.events import close
from diffkiln.serving.orders import Accepted, Event, Finished, Order, Progress
from diffkiln.serving.refusals import Refusal, late, refusal_of
from diffkiln.serving.settings import Settings

log = get_logger(__name__)

Status = Literal["queued", "in_progress", "completed", "failed"]
_PREFIX = "video_"
#: Percent that a job shows at most while it is not completed: the file is still to be written after the last step.
_ALMOST = 99
#: Seconds for which a client waits for its order to be accepted or refused, before it is told that it is queued.
_PATIENCE = 1.0


class VideoError(BaseModel):
    """The reason why a job failed."""

    code: str
    message: str


class Video(BaseModel):
    """A job for a video."""

    id: str
    object: Literal["video"] = "video"
    status: Status
    progress: int = Field(ge=0, le=100, description="Percent of the steps.")
    created_at: int = Field(description="Seconds since 1970.")
    completed_at: int | None = None
    expires_at: int | None = Field(default=None, description="When the file is let go, at the latest.")
    model: str
    prompt: str | None
    seconds: str = Field(description="How long the video is.")
    size: str
    seed: int = Field(description="Draws the same video again.")
    output_format: str
    error: VideoError | None = None
    remixed_from_video_id: None = None


class Videos(BaseModel):
    """Jobs, a page of them."""

    object: Literal["list"] = "list"
    data: list[Video]
    first_id: str | None
    last_id: str | None
    has_more: bool


class Deleted(BaseModel):
    """A job that is gone."""

    id: str
    object: Literal["video.deleted"] = "video.deleted"
    deleted: Literal[True] = True


def _future() -> asyncio.Future[Refusal | None]:
    return asyncio.get_running_loop().create_future()


@dataclass(eq=False)
class VideoJob:
    """A job, from its acceptance until it is deleted or expires.

    Attributes:
        shown: What clients see of it.
        owner: Whose it is; others do not see it.
        data: The file, once it is there.
        accepted: Why the order is refused, or None, once this is known.
        expires: When an ended job is forgotten, of the monotonic clock.
        task: What follows the order.
    """

    shown: Video
    owner: bytes
    data: bytes = b""
    accepted: asyncio.Future[Refusal | None] = field(default_factory=_future)
    expires: float = 0.0
    task: asyncio.Task[None] | None = None

    @property
    def ended(self) -> bool:
        return self.shown.status in ("completed", "failed")


class VideoJobs:
    """The jobs of one process.

    Args:
        settings: How many are kept, how many bytes, and for how long.
        timed: Told how long each job took, in seconds.
    """

    def __init__(self, settings: Settings, timed: Callable[[float], None] = lambda _: None) -> None:
        self._settings, self._timed = settings, timed
        self._run = secrets.token_hex(4)
        self._kept: dict[str, VideoJob] = {}

    async def add(
        self,
        order: Order,
        events: AsyncIterator[Event],
        owner: bytes,
        model: str,
        size: str,
        seconds: str,
    ) -> Video:
        """Keeps a job, follows it, and waits a moment for its acceptance.

        Args:
            order: What is made.
            events: What becomes of the order.
            owner: Who may look at the job.
            model: Name of the bundle.
            size: Width and height in pixels.
            seconds: How long the video is.

        Raises:
            Refusal: the order is refused, or all jobs that are kept have not ended.
        """
        self._make_room()
        shown = Video(
            id=f"{_PREFIX}{self._run}{secrets.token_hex(12)}",
            status="queued",
            progress=0,
            created_at=int(time.time()),
            model=model,
            prompt=order.prompts.get("prompt"),
            seconds=seconds,
            size=size,
            seed=order.seed,
            output_format=order.ending,
        )
        job = self._kept[shown.id] = VideoJob(shown, owner)
        job.task = asyncio.create_task(self._follow(job, events))
        await asyncio.wait({job.accepted}, timeout=_PATIENCE)
        if job.accepted.done() and (refusal := job.accepted.result()) is not None:
            self._kept.pop(shown.id, None)
            raise refusal
        return job.shown

    def get(self, identity: str, owner: bytes) -> VideoJob:
        """Returns a job. Raises `Refusal` (404) that says why it is not there."""
        self._expire()
        job = self._kept.get(identity)
        if job is None or job.owner != owner:
            raise Refusal(404, self._why_not(identity), "video_id")
        return job

    def content(self, identity: str, owner: bytes) -> VideoJob:
        """Returns a completed job. Raises `Refusal` if it is not there, or has no file."""
        job = self.get(identity, owner)
        if job.shown.error is not None:
            raise Refusal(404, f"this video failed: {job.shown.error.message}", "video_id")
        if not job.ended:
            reason = f"this video is {job.shown.status.replace('_', ' ')}, {job.shown.progress} %. Ask again when it is"
            raise Refusal(409, f"{reason} completed", "video_id")
        return job

    def listed(self, owner: bytes, after: str | None, limit: int, newest_first: bool) -> Videos:
        """Returns the jobs of an owner, those that follow `after`. Raises `Refusal` if that one is not there."""
        if after is not None:
            self.get(after, owner)
        self._expire()
        rows = [job.shown for job in self._kept.values() if job.owner == owner]
        rows = rows[::-1] if newest_first else rows
        start = 1 + next((number for number, row in enumerate(rows) if row.id == after), -1)
        page = rows[start : start + limit]
        first, last = (page[0].id, page[-1].id) if page else (None, None)
        return Videos(data=page, first_id=first, last_id=last, has_more=len(rows) > start + limit)

    async def delete(self, identity: str, owner: bytes) -> Deleted:
        """Forgets a job, and gives it up at its next step if it has not ended."""
        job = self.get(identity, owner)
        del self._kept[identity]
        if job.task is not None and not job.ended:
            job.task.cancel()
            with suppress(asyncio.CancelledError):
                await job.task
        return Deleted(id=identity)

    # -- following --

    async def _follow(self, job: VideoJob, events: AsyncIterator[Event]) -> None:
        started = time.monotonic()
        try:
            async with asyncio.timeout(self._settings.job_seconds):
                async for event in events:
                    if isinstance(event, Accepted):
                        job.accepted.set_result(None)
                    elif isinstance(event, Progress):
                        _tell(job, status="in_progress", progress=min(_ALMOST, 100 * event.step // event.steps))
                    elif isinstance(event, Finished):
                        self._complete(job, event.data)
        except TimeoutError:
            self._fail(job, late())
        except Exception as error:
            self._fail(job, refusal_of(error))
        finally:
            await close(events)
            self._timed(time.monotonic() - started)

    def _complete(self, job: VideoJob, data: bytes) -> None:
        most = self._settings.kept_video_bytes
        if len(data) > most:
            reason = f"the file has {len(data):,} bytes, more than the {most:,} that are kept. Ask for a smaller format"
            raise Refusal(507, reason)
        while self._bytes + len(data) > most and self._drop_oldest(with_data=True):
            pass
        job.data = data
        self._end(job, status="completed", progress=100)

    def _fail(self, job: VideoJob, refusal: Refusal) -> None:
        if not job.accepted.done():
            job.accepted.set_result(refusal)
        kind = refusal.body["error"]["type"]
        self._end(job, status="failed", error=VideoError(code=kind, message=printable(refusal.reason, 500)))
        log.warning("video %s failed: %s", job.shown.id, refusal.reason)

    def _end(self, job: VideoJob, **changed: object) -> None:
        now, kept = time.time(), self._settings.kept_video_seconds
        job.expires = time.monotonic() + kept
        _tell(job, completed_at=int(now), expires_at=int(now) + math.ceil(kept), **changed)
        # Nobody may ask again, and the memory is wanted back all the same.
        asyncio.get_running_loop().call_later(kept + 1, self._expire)

    # -- keeping --

    def _make_room(self) -> None:
        """Forgets the oldest job where there are too many for one more. Raises `Refusal` where none has ended."""
        self._expire()
        while len(self._kept) >= self._settings.kept_videos:
            if not self._drop_oldest():
                reason = f"{len(self._kept)} videos are being made or wait already. Try again later"
                raise Refusal(429, reason, retry_after=10)

    @property
    def _bytes(self) -> int:
        return sum(len(job.data) for job in self._kept.values())

    def _expire(self) -> None:
        now = time.monotonic()
        ends = [key for key, job in self._kept.items() if job.ended and now >= job.expires]
        for identity in ends:
            del self._kept[identity]

    def _drop_oldest(self, with_data: bool = False) -> bool:
        """Forgets the job that was asked for first, of those that have ended; returns False if there is none."""
        ended = (key for key, job in self._kept.items() if job.ended and (job.data or not with_data))
        oldest = next(ended, None)
        if oldest is not None:
            del self._kept[oldest]
        return oldest is not None

    def _why_not(self, identity: str) -> str:
        shown = printable(identity[:60])
        if not identity.startswith(_PREFIX):
            return f"{shown} is no video's id, which begins with {_PREFIX}"
        if not identity.startswith(_PREFIX + self._run):
            return (
                f"{shown} is of another process, or of this one before it was started again: jobs are kept in memory, "
                "and lost with it. Ask for the video again; its seed gives the same one"
            )
        return f"{shown} is not here: it was deleted, has expired, made room for later ones, or is another token's"


def _tell(job: VideoJob, **changed: object) -> None:
    job.shown = job.shown.model_copy(update=changed)
