"""Bodies that come slowly, and an application of a test's own that they come to."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from tallystick.app import create_app
from tallystick.resources import Resources


@asynccontextmanager
async def started(resources: Resources) -> AsyncIterator[FastAPI]:
    """An application that is built now, with the limits that the test has set."""
    app = create_app(resources.settings)
    async with app.router.lifespan_context(app):
        yield app


class SlowBody:
    """A body whose second half comes when the test says so."""

    def __init__(self, *halves: bytes) -> None:
        self.halves = halves
        self.half_is_read, self.go_on = asyncio.Event(), asyncio.Event()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield self.halves[0]
        self.half_is_read.set()
        await self.go_on.wait()
        yield self.halves[1]
