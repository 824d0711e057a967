"""Orders: what a request asks for, after it was checked; and the rows that they are run as."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from diffkiln.serving.offer import Choice


@dataclass(frozen=True)
class Order:
    """The work that a request asks for.

    Attributes:
        request: Its id, for the log.
        prompts: Keyword → text.
        asked: Other keywords of the call.
        images: Keyword → images.
        count: Images, or videos, to make.
        seed: Of the first; the others have the seeds after it.
        ending: Format to write them in: "png", "jpeg", "webp", or "mp4" and "webp" for videos.
        quality: Of "jpeg" and "webp", in percent.
        fps: Frames a second of a video.
        watched: Whether somebody wants to hear of steps.
        previews: Pictures of steps before the last, for each image.
        lora: Adapters with their scales.
    """

    request: str
    prompts: Mapping[str, str]
    asked: Mapping[str, Any]
    images: Mapping[str, tuple[Any, ...]]
    count: int
    seed: int
    ending: str = "png"
    quality: int = 95
    fps: float = 16.0
    watched: bool = False
    previews: int = 0
    lora: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Accepted:
    """The order has a place in the queue."""


@dataclass(frozen=True)
class Progress:
    """A step that has passed, of the image that is furthest."""

    step: int
    steps: int


@dataclass(frozen=True)
class Shown:
    """One image or video of an order as it would be if the step that has just ended were its last.

    Attributes:
        index: Of the image.
        seed: Of the image.
        number: Of the preview, from 0.
        picture: What the pipeline gives.
    """

    index: int
    seed: int
    number: int
    picture: Any


@dataclass(frozen=True)
class Made:
    """One image or video of an order, as the pipeline gives it."""

    index: int
    seed: int
    picture: Any


@dataclass(frozen=True)
class Failed:
    """The reason why an order cannot be carried out."""

    error: Exception


@dataclass(frozen=True)
class Preview:
    """A preview as the file of an image, which of a video is its middle frame."""

    index: int
    seed: int
    number: int
    data: bytes


@dataclass(frozen=True)
class Finished:
    """An image or a video as a file."""

    index: int
    seed: int
    data: bytes


#: What whoever gave the order is told: first that it is accepted, last its images.
Event = Accepted | Progress | Preview | Finished
#: What the pipeline's thread tells.
JobEvent = Progress | Shown | Made | Failed


@dataclass(eq=False)
class Job:
    """An order on its way through the queue and the pipeline.

    Attributes:
        order: What it asks for.
        choice: What it is run with.
        tell: Called from the pipeline's thread with what happens.
        since: When it came, of the monotonic clock.
        left: Whether nobody waits for it any more; it is dropped at the next step.
    """

    order: Order
    choice: Choice
    tell: Callable[[JobEvent], None]
    since: float = field(default_factory=time.monotonic)
    _gone: threading.Event = field(default_factory=threading.Event)

    @property
    def left(self) -> bool:
        return self._gone.is_set()

    def leave(self) -> None:
        """Gives the order up."""
        self._gone.set()

    @property
    def kind(self) -> tuple[Any, ...]:
        """Returns what jobs that may share a call have in common."""
        order = self.order
        return id(self.choice), tuple(sorted(order.prompts)), tuple(sorted(order.images))

    @cached_property
    def shown(self) -> Mapping[int, int]:
        """Returns the steps, from 1, at whose end a preview is made, and the numbers of these previews."""
        steps, wanted = self.choice.steps, self.order.previews
        even = {max(1, steps * (number + 1) // (wanted + 1)) for number in range(wanted)}
        return {step: number for number, step in enumerate(sorted(even - {steps}))}

    @property
    def rows(self) -> list[Row]:
        """Returns one row for each prompt that has to be drawn."""
        each = self.choice.images
        return [Row(self, start, min(each, self.order.count - start)) for start in range(0, self.order.count, each)]


@dataclass(eq=False)
class Row:
    """One prompt of a call: the images `start` … of its job, `count` of which are wanted."""

    job: Job
    start: int
    count: int

    @property
    def seeds(self) -> list[int]:
        """Returns a seed for each image that the variant gives for the prompt."""
        return [self.job.order.seed + self.start + image for image in range(self.job.choice.images)]
