"""A Stripe that only lets objects be retrieved, and whose answers a test can hold back."""

import asyncio
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response


@dataclass
class Stripe:
    """Stripe's API, as far as retrieving goes. An object that is a number is an HTTP status."""

    objects: dict[str, Any] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    accounts: dict[str, str | None] = field(default_factory=dict)
    gates: dict[str, asyncio.Event] = field(default_factory=dict)
    arrived: asyncio.Event = field(default_factory=asyncio.Event)

    async def answer(self, request: Request) -> Response:
        path = request.url.path.removeprefix("/v1/")
        self.asked.append(path)
        self.accounts[path] = request.headers.get("stripe-account")
        if "starting_after" in request.query_params:
            path = f"{path}?after={request.query_params['starting_after']}"
        found = self.objects.get(path, 404)
        self.arrived.set()
        if path in self.gates:
            await self.gates[path].wait()
        if isinstance(found, int):
            return JSONResponse({"error": {"type": "api_error", "code": "resource_missing"}}, found)
        return JSONResponse(found)
