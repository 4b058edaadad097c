"""Waiting for a condition that another process brings about, and that nothing here is told of."""

import asyncio
from collections.abc import Awaitable, Callable

PATIENCE_SECONDS = 20


async def wait_until(condition: Callable[[], Awaitable[bool]]) -> None:
    """Return as soon as the condition holds; `TimeoutError` if it never does."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not await condition():  # noqa: ASYNC110  there is no event to wait for: the change is elsewhere
            await asyncio.sleep(0.01)
