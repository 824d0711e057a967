"""Connections whose clients do not read: they are ended, so that nothing waits for them."""

from __future__ import annotations

import asyncio
from unittest.mock import MagicMock

import uvicorn
from uvicorn.server import ServerState

from diffkiln.serving.protocol import protocol_for
from diffkiln.serving.settings import Settings


async def _nothing(scope, receive, send) -> None:
    """An application that says nothing."""


def connected():
    config = uvicorn.Config(_nothing, lifespan="off", log_config=None)
    made = protocol_for(Settings(stall_seconds=0.05, head_seconds=0.05))(config, ServerState(), {})
    transport = MagicMock(asyncio.Transport)
    transport.is_closing.return_value = False
    transport.get_extra_info.return_value = None
    made.connection_made(transport)
    return made, transport


def test_a_client_that_takes_nothing_of_its_answer_is_disconnected():
    async def run() -> None:
        stalled, first = connected()
        reading, second = connected()
        for each in (stalled, reading):
            each.pause_writing()
        reading.resume_writing()
        await asyncio.sleep(0.3)
        first.abort.assert_called_once()
        second.abort.assert_not_called()

    asyncio.run(run())


def test_what_is_armed_ends_with_the_connection():
    async def run() -> None:
        made, transport = connected()
        made.pause_writing()
        made.connection_lost(None)
        transport.close.reset_mock()
        await asyncio.sleep(0.3)
        transport.abort.assert_not_called()
        transport.close.assert_not_called()

    asyncio.run(run())
