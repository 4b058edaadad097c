"""How many requests one process works on at once: the rest is told at once to come again, and memory stays bounded."""

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tallystick.errors import Unavailable

# More would not be done sooner, only each of them later.
MAX_AT_WORK = 32
# Reads are short, and those of access share statements: many of them cost hardly more than one.
MAX_READS_AT_WORK = 256


class Crowd:
    """The application, with a limit on the requests under `/v1` that it works on at once.

    Webhooks have a queue of their own (webhooks/inbox.py), so they pass. A request whose body is still on its way costs
    no work and does not count: slow senders keep nobody else out.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self.reads, self.writes = _Room(MAX_READS_AT_WORK), _Room(MAX_AT_WORK)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith("/v1/"):
            await self.app(scope, receive, send)
            return
        room = self.reads if scope["method"] == "GET" else self.writes
        if room.taken >= room.places:
            problem = Unavailable("Too many requests at once; send it again.", retry_after_seconds=1)
            await problem.answer()(scope, receive, send)
            return

        async def receive_without_work() -> Message:
            room.taken -= 1
            try:
                return await receive()
            finally:
                room.taken += 1

        room.taken += 1
        try:
            await self.app(scope, receive_without_work, send)
        finally:
            room.taken -= 1


class _Room:
    def __init__(self, places: int) -> None:
        self.places, self.taken = places, 0
