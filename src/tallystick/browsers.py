"""What browsers are told with every answer: security headers, and which origins may call which route (CORS).

Pure ASGI and around everything else, so that errors are covered too. TLS and with it Strict-Transport-Security belong
to the proxy in front, which alone knows whether a host is served over HTTPS only.
"""

from collections.abc import Mapping

from starlette.types import ASGIApp, Message, Receive, Scope, Send

HeaderList = tuple[tuple[bytes, bytes], ...]

ALWAYS: HeaderList = (
    (b"x-content-type-options", b"nosniff"),  # JSON stays JSON, whatever it looks like
    (b"referrer-policy", b"no-referrer"),  # a reference in a path is nobody else's business
)
# For answers that do not say better themselves: they are private, and no document that could load anything.
UNLESS_GIVEN: HeaderList = (
    (b"cache-control", b"no-store"),
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
)
# How long a browser may remember what a route permits; the settings change with a restart only.
PREFLIGHT_SECONDS = b"600"


class Browsers:
    """The application with these headers on each of its answers.

    `cors_routes`: path → the method that pages of `cors_origins` may use there. No other route is open to them, no
    origin is allowed by a pattern, and cookies play no part: a caller is known by its `Authorization` alone.
    """

    def __init__(self, app: ASGIApp, cors_origins: tuple[str, ...], cors_routes: Mapping[str, str]) -> None:
        self.app = app
        self.origins = frozenset(origin.encode() for origin in cors_origins)
        self.routes = cors_routes if cors_origins else {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        method = self.routes.get(scope["path"])
        cors = self._cors_headers(scope) if method is not None else ()

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                given = message["headers"]
                names = {name for name, _ in given}
                defaults = [header for header in UNLESS_GIVEN if header[0] not in names]
                message["headers"] = [*given, *ALWAYS, *defaults, *cors]
            await send(message)

        if method is not None and len(cors) > 1 and _is_preflight(scope):
            allowed = [
                (b"access-control-allow-methods", method.encode()),
                (b"access-control-allow-headers", b"Authorization, Content-Type"),
                (b"access-control-max-age", PREFLIGHT_SECONDS),
            ]
            await send_with_headers({"type": "http.response.start", "status": 204, "headers": allowed})
            await send_with_headers({"type": "http.response.body"})
            return
        await self.app(scope, receive, send_with_headers)

    def _cors_headers(self, scope: Scope) -> HeaderList:
        # Caches must know that the answer depends on it, even where the origin is refused.
        vary = (b"vary", b"Origin")
        origin = next((value for name, value in scope["headers"] if name == b"origin"), None)
        if origin not in self.origins:
            return (vary,)
        return vary, (b"access-control-allow-origin", origin), (b"access-control-expose-headers", b"Retry-After")


def _is_preflight(scope: Scope) -> bool:
    return scope["method"] == "OPTIONS" and any(
        name == b"access-control-request-method" for name, _ in scope["headers"]
    )
