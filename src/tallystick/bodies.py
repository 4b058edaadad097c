"""Request bodies, read with a limit."""

from starlette.requests import Request

from tallystick.errors import InvalidRequest, TooLarge


async def read_body(request: Request, limit_bytes: int) -> bytes:
    """The raw body. Raises `TooLarge` (413) as soon as it is known to exceed the limit, before the rest is read."""
    declared = request.headers.get("content-length", "0")
    if not declared.isdecimal():
        raise InvalidRequest("Content-Length is not a number.", status=400)
    if int(declared) > limit_bytes:
        raise TooLarge(f"The body may have at most {limit_bytes} bytes.")
    chunks: list[bytes] = []
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > limit_bytes:
            raise TooLarge(f"The body may have at most {limit_bytes} bytes.")
        chunks.append(chunk)
    return b"".join(chunks)
