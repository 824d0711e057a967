"""Server-sent events: steps and images as they come, named as OpenAI names them."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, suppress
from typing import Any

from diffkiln.serving.files import preview_ending
from diffkiln.serving.orders import Event, Finished, Order, Preview, Progress
from diffkiln.serving.refusals import late, refusal_of

#: Seconds without an event after which a comment keeps proxies from closing the connection.
HEARTBEAT = 15.0
_END = object()


async def stream(
    kind: str, order: Order, events: AsyncIterator[Event], size: str | None, ends: float
) -> AsyncIterator[bytes]:
    """Gives the events of an order as bytes. An error is an event, too: the answer's head has been sent.

    Args:
        kind: "image_generation", "image_edit" or "video_generation".
        order: What was asked for.
        events: What its service gives, after it was accepted.
        size: Width and height in pixels.
        ends: When it is too late, of the loop's clock.
    """
    try:
        async with aclosing(_beating(events, ends)) as beating:
            async for event in beating:
                if isinstance(event, Progress):
                    yield _event({"type": f"{kind}.progress", "step": event.step, "steps": event.steps})
                elif isinstance(event, Preview):
                    message = {"type": f"{kind}.partial_image", "partial_image_index": event.number}
                    yield _event(message | _file(event, preview_ending(order.ending), size))
                elif isinstance(event, Finished):
                    yield _event({"type": f"{kind}.completed"} | _file(event, order.ending, size))
                elif event is None:
                    yield b": still here\n\n"
    except Exception as error:
        yield _event({"type": "error", **refusal_of(error).body})


async def _beating(events: AsyncIterator[Event], ends: float) -> AsyncGenerator[Event | None, None]:
    """Yields the events, and None where there was none for a while. Raises `Refusal` when it is too late."""
    clock = asyncio.get_running_loop().time
    coming: asyncio.Task[Any] = asyncio.ensure_future(_after(events))
    try:
        while True:
            done, _ = await asyncio.wait({coming}, timeout=min(HEARTBEAT, max(ends - clock(), 0.0)))
            event = coming.result() if done else None
            if event is _END:
                return
            if not done and clock() >= ends:
                raise late()
            yield event
            if done:
                coming = asyncio.ensure_future(_after(events))
    finally:
        coming.cancel()
        with suppress(asyncio.CancelledError, Exception):
            await coming
        await close(events)


async def _after(events: AsyncIterator[Event]) -> Any:
    return await anext(events, _END)


async def close(events: AsyncIterator[Any]) -> None:
    """Ends an iterator before its end, so that its order is given up now."""
    if (end := getattr(events, "aclose", None)) is not None:
        await end()


def _file(event: Finished | Preview, ending: str, size: str | None) -> dict[str, Any]:
    return {
        "b64_json": base64.b64encode(event.data).decode(),
        "created_at": int(time.time()),
        "output_format": ending,
        "size": size or "auto",
        "quality": "auto",
        "background": "opaque",
        "seed": event.seed,
    }


def _event(data: dict[str, Any]) -> bytes:
    return f"event: {data['type']}\ndata: {json.dumps(data)}\n\n".encode()
