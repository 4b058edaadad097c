"""Request bodies, read with a limit, and with their `Content-Encoding` undone where that is asked for."""

import zlib

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tallystick.errors import InvalidRequest, Problem, TooLarge, Unavailable, Unsupported

# RFC 9110, 8.4.1.3: `x-gzip` is the old name of `gzip`.
GZIP = frozenset({"gzip", "x-gzip"})
GZIP_HEADER = 16 + zlib.MAX_WBITS  # tells zlib to expect gzip's header and checksum
# A gzip file may be several files joined. Each one costs a copy of what follows it, so there is a limit.
MAX_GZIP_MEMBERS = 1_000


class Arriving:
    """The bodies of one kind that are arriving at a process: how many bytes they may have together.

    A body that is complete does not count: it is worked on, refused, or gone. So a small one, which comes in one piece,
    passes however many others have begun and are not ended.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.left = limit_bytes

    def take(self, number: int) -> None:
        """Count bytes, to be given back when the body is complete or given up. Raises `Unavailable` (503)."""
        if number > self.left:
            raise Unavailable("Too much is being sent at once; send it again.", retry_after_seconds=1)
        self.left -= number


class BodyRefused(HTTPException):
    """A problem that is found while a body is read: FastAPI lets no other kind of error through there."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.status, problem.detail)
        self.problem = problem


async def read_body(request: Request, limit_bytes: int, arriving: Arriving) -> bytes:
    """The raw body.

    Raises `TooLarge` (413) as soon as it is known to exceed the limit, before the rest is read, and `Unavailable` (503)
    when too much is arriving.
    """
    given = request.headers.get("content-length", "0")
    if not given.isdecimal():
        raise InvalidRequest("Content-Length is not a number.", status=400)
    if len(given) > 18 or (declared := int(given)) > limit_bytes:  # int() itself refuses thousands of digits
        raise _too_large(limit_bytes)
    chunks: list[bytes] = []
    size = counted = 0
    try:
        async for chunk in request.stream():
            size += len(chunk)
            if size > limit_bytes:
                raise _too_large(limit_bytes)
            if size != declared:
                arriving.take(len(chunk))
                counted += len(chunk)
            chunks.append(chunk)
    finally:
        arriving.left += counted
    return b"".join(chunks)


class LimitedBodies:
    """The application, with limits on the bodies that FastAPI would read however large and many they are.

    The plain routes read theirs with `read_body` and limits of their own (plain_routes.py).
    """

    def __init__(self, app: ASGIApp, limit_bytes: int, arriving: Arriving) -> None:
        self.app = app
        self.limit_bytes = limit_bytes
        self.arriving = arriving

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        size = counted = 0
        # For the answer to what cannot be read (app.py): FastAPI keeps the body from it.
        chunks = scope["tallystick.body"] = []

        async def receive_within_limits() -> Message:
            nonlocal size, counted
            message = await receive()
            chunks.append(message.get("body", b""))
            number = len(chunks[-1])
            size += number
            if size > self.limit_bytes:
                raise BodyRefused(_too_large(self.limit_bytes))
            if message.get("more_body"):
                try:
                    self.arriving.take(number)
                except Unavailable as problem:
                    raise BodyRefused(problem) from None
                counted += number
            else:
                self.arriving.left += counted
                counted = 0
            return message

        try:
            await self.app(scope, receive_within_limits, send)
        finally:
            self.arriving.left += counted


async def read_decoded_body(request: Request, limit_bytes: int, arriving: Arriving) -> bytes:
    """The body after its `Content-Encoding` (RFC 9110, 8.4), of which `gzip` is understood.

    The limit holds before and after. Raises what `read_body` raises, `Unsupported` (415) for other encodings, and
    `InvalidRequest` (400) for a stream that is damaged or ends early.
    """
    given = ",".join(request.headers.getlist("content-encoding"))
    encodings = [name for part in given.split(",") if (name := part.strip().lower()) not in ("", "identity")]
    if len(encodings) > 1 or not GZIP.issuperset(encodings):
        raise Unsupported(
            f"The Content-Encoding {given[:100]!a} is not supported; send gzip or none.",
            type="unsupported-encoding",
            header=("Accept-Encoding", "gzip, identity"),
        )
    raw = await read_body(request, limit_bytes, arriving)
    return _gunzip(raw, limit_bytes) if encodings else raw


def _gunzip(raw: bytes, limit_bytes: int) -> bytes:
    """Undo gzip (RFC 1952), and stop as soon as more than the limit has come out."""
    parts: list[bytes] = []
    size = 0
    while raw:
        member = zlib.decompressobj(GZIP_HEADER)
        try:
            part = member.decompress(raw, limit_bytes - size + 1)
        except zlib.error:
            raise _broken_gzip("is damaged") from None
        size += len(part)
        if size > limit_bytes:
            raise _too_large(limit_bytes)
        if not member.eof:
            raise _broken_gzip("ends early")
        parts.append(part)
        if len(parts) > MAX_GZIP_MEMBERS:
            raise _broken_gzip(f"consists of more than {MAX_GZIP_MEMBERS} members")
        raw = member.unused_data
    return b"".join(parts)


def _broken_gzip(what: str) -> InvalidRequest:
    return InvalidRequest(f"The gzip stream of the body {what}.", type="invalid-gzip", status=400)


def _too_large(limit_bytes: int) -> TooLarge:
    return TooLarge(f"The body may have at most {limit_bytes} bytes.")
