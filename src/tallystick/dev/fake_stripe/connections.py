"""Dropping a connection without an answer, as a network does."""

from __future__ import annotations

from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

CONNECTION = "fake_stripe.connection"


def remember_connection(scope: Scope, send: Send) -> None:
    """Notes the transport below an ASGI request. uvicorn's `send` is a method of the object that has it."""
    scope[CONNECTION] = getattr(getattr(send, "__self__", None), "transport", None)


class DroppedConnection(Response):
    """A response that closes the connection and sends nothing."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Not told by its type: uvloop's transports are no subclass of asyncio's.
        transport: Any = scope.get(CONNECTION)
        if transport is None:
            raise RuntimeError("Connections can be dropped under uvicorn only")
        transport.close()
        # The server must have seen the end before this returns, or it would answer 500 for want of an answer.
        while (await receive())["type"] != "http.disconnect":
            pass
