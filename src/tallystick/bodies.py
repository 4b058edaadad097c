"""Request bodies, read with a limit, and with their `Content-Encoding` undone where that is asked for."""

import zlib

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tallystick.errors import InvalidRequest, TooLarge, Unsupported

# RFC 9110, 8.4.1.3: `x-gzip` is the old name of `gzip`.
GZIP = frozenset({"gzip", "x-gzip"})
GZIP_HEADER = 16 + zlib.MAX_WBITS  # tells zlib to expect gzip's header and checksum
# A gzip file may be several files joined. Each one costs a copy of what follows it, so there is a limit.
MAX_GZIP_MEMBERS = 1_000


async def read_body(request: Request, limit_bytes: int) -> bytes:
    """The raw body. Raises `TooLarge` (413) as soon as it is known to exceed the limit, before the rest is read."""
    declared = request.headers.get("content-length", "0")
    if not declared.isdecimal():
        raise InvalidRequest("Content-Length is not a number.", status=400)
    if len(declared) > 18 or int(declared) > limit_bytes:  # int() itself refuses thousands of digits
        raise _too_large(limit_bytes)
    chunks: list[bytes] = []
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > limit_bytes:
            raise _too_large(limit_bytes)
        chunks.append(chunk)
    return b"".join(chunks)


class LimitedBodies:
    """The application, with a limit on the bodies that FastAPI would read however large they are.

    The plain routes read theirs with `read_body` and limits of their own (plain_routes.py).
    """

    def __init__(self, app: ASGIApp, limit_bytes: int) -> None:
        self.app = app
        self.limit_bytes = limit_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        size = 0
        # For the answer to what cannot be read (app.py): FastAPI keeps the body from it.
        chunks = scope["tallystick.body"] = []

        async def receive_within_limit() -> Message:
            nonlocal size
            message = await receive()
            chunks.append(message.get("body", b""))
            size += len(chunks[-1])
            if size > self.limit_bytes:
                # The one kind of error that FastAPI lets through while it reads a body.
                raise HTTPException(413, f"The body may have at most {self.limit_bytes} bytes.")
            return message

        await self.app(scope, receive_within_limit, send)


async def read_decoded_body(request: Request, limit_bytes: int) -> bytes:
    """The body after its `Content-Encoding` (RFC 9110, 8.4), of which `gzip` is understood.

    The limit holds before and after. Raises `TooLarge` (413), `Unsupported` (415) for other encodings, and
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
    raw = await read_body(request, limit_bytes)
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
