"""A product that receives notifications over HTTP, and the rules file that names it."""

import asyncio
import dataclasses
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy import text
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from tallystick import db
from tallystick.notifications.outbox import Notification, queue_notifications
from tallystick.resources import Resources
from tallystick.rules import RulesFile
from tests.serving import serve
from tests.waiting import wait_until

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
OLD_SECRET = "whsec_C2FVsBQIhrscChlQIMV+b5sSYspob7oDC2FVsBQIhrsc"


@dataclass
class Received:
    """One request, as it came."""

    path: str
    headers: dict[str, str]
    body: str

    @property
    def id(self) -> str:
        return self.headers["webhook-id"]

    @property
    def customer(self) -> str:
        return str(json.loads(self.body)["data"]["customer"])


@dataclass
class Receiver:
    """Answers with `answers` one after the other, then with 204; to customers in `held` only when it is let go."""

    url: str = ""
    answers: list[Response] = field(default_factory=list)
    received: list[Received] = field(default_factory=list)
    held: set[str] = field(default_factory=set)
    released: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(0))

    async def receive(self, request: Request) -> Response:
        body = (await request.body()).decode()
        got = Received(request.url.path, dict(request.headers), body)
        self.received.append(got)
        if got.customer in self.held:
            await self.released.acquire()
        return self.answers.pop(0) if self.answers else Response(status_code=204)

    def let_go(self, number: int = 1000) -> None:
        """Answer the first so many of the requests that wait, or will come."""
        for _ in range(number):
            self.released.release()

    @property
    def ids(self) -> list[str]:
        return [got.id for got in self.received]

    async def has(self, number: int) -> None:
        """Wait until so many requests have come."""

        async def come() -> bool:
            return len(self.received) >= number

        await wait_until(come)


@asynccontextmanager
async def receiving() -> AsyncIterator[Receiver]:
    receiver = Receiver()
    app = Starlette(routes=[Route("/{path:path}", receiver.receive, methods=["POST", "GET"])])
    async with serve(app) as url:
        receiver.url = f"{url}/hooks"
        try:
            yield receiver
        finally:
            receiver.let_go()


def endpoint(name: str, url: str, **changed: Any) -> dict[str, Any]:
    return {"name": name, "url": url, "secrets": [SECRET], "allow_private_network": True} | changed


def with_endpoints(resources: Resources, folder: Path, *endpoints: dict[str, Any]) -> Resources:
    """The same resources under a rules file with these endpoints."""
    path = folder / f"rules-{len(list(folder.iterdir()))}.toml"
    # JSON's strings, lists and booleans are TOML's too.
    sections = ("\n".join(f"{key} = {json.dumps(value)}" for key, value in one.items()) for one in endpoints)
    path.write_text("\n".join(f"[[notifications]]\n{section}" for section in sections))
    return dataclasses.replace(resources, rules=RulesFile(path))


async def tell(resources: Resources, *customers: str, kind: Any = "usage.parked") -> list[str]:
    """Queue a notification for each of these, in order; their ids."""
    ids: list[str] = []
    for number, customer in enumerate(customers):
        async with db.transaction(resources.engine) as connection:
            await queue_notifications(connection, [Notification(kind, customer, {"number": str(number)})])
            ids.append(str(await connection.scalar(text("SELECT id FROM notifications ORDER BY number DESC LIMIT 1"))))
    return ids


async def states(resources: Resources) -> list[tuple[Any, ...]]:
    """State and tries of each delivery, in order."""
    async with db.transaction(resources.engine) as connection:
        rows = await connection.execute(
            text("SELECT state, attempts, outcome FROM notification_deliveries ORDER BY number, endpoint")
        )
        return [tuple(row) for row in rows]


async def make_due(resources: Resources) -> None:
    """Let what waits for its next try be due now."""
    async with db.transaction(resources.engine) as connection:
        await connection.execute(
            text(
                "UPDATE notification_deliveries SET next_attempt_at = now() - interval '1 min' WHERE state = 'pending'"
            )
        )


async def read(resources: Resources, query: str) -> Sequence[Any]:
    async with db.transaction(resources.engine) as connection:
        return (await connection.execute(text(query))).all()
