"""How many requests one process works on at once: the rest is told at once to come again, and memory stays bounded."""

from collections.abc import Awaitable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tallystick.bodies import BodyRefused
from tallystick.errors import Unavailable

# More would not be done sooner, only each of them later.
MAX_AT_WORK = 32
# Reads are short, and those of access share statements: many of them cost hardly more than one.
MAX_READS_AT_WORK = 256
# They wait for others, for seconds when those are slow: among the writes they would stop usage.
MAX_PORTALS_AT_WORK = 32


class Crowd:
    """The application, with a limit on the requests under `/v1` that it works on at once.

    A request needs a place while it is worked on: not while its body is on its way, nor while its answer is. So those
    who send or read slowly keep nobody else out. Webhooks have a queue of their own (webhooks/inbox.py) and pass.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self.reads, self.writes = _Room(MAX_READS_AT_WORK), _Room(MAX_AT_WORK)
        self.special = {"/v1/access": self.reads, "/v1/portal/sessions": _Room(MAX_PORTALS_AT_WORK)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith("/v1/"):
            await self.app(scope, receive, send)
            return
        room = self.reads if scope["method"] == "GET" else self.special.get(scope["path"], self.writes)
        if room.taken >= room.places:
            await _crowded().answer()(scope, receive, send)
            return
        has_place, is_complete = True, False

        def leave() -> None:
            nonlocal has_place
            if has_place:
                has_place = False
                room.taken -= 1

        async def receive_without_place() -> Message:
            nonlocal has_place, is_complete
            if is_complete:
                return await receive()
            leave()
            message = await receive()
            is_complete = message["type"] == "http.request" and not message.get("more_body")
            if is_complete:
                # Whoever reads a body has written nothing yet, so that it can be sent again.
                if room.taken >= room.places:
                    raise BodyRefused(_crowded())
                has_place = True
                room.taken += 1
            return message

        def send_without_place(message: Message) -> Awaitable[None]:
            leave()
            return send(message)

        room.taken += 1
        try:
            await self.app(scope, receive_without_place, send_without_place)
        finally:
            leave()


class _Room:
    def __init__(self, places: int) -> None:
        self.places, self.taken = places, 0


def _crowded() -> Unavailable:
    return Unavailable("Too many requests at once; send it again.", retry_after_seconds=1)
