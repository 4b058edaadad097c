"""What the operator sees of each request: an id in the log lines and in the answer, its time by route, and a span.

Pure ASGI and around everything else, so that refusals are seen too. It knows paths by their templates only: a path
itself may hold a customer's reference.
"""

import re
from itertools import count
from secrets import token_hex
from time import perf_counter

from prometheus_client import Histogram
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from structlog.contextvars import bind_contextvars, clear_contextvars

from tallystick import tracing
from tallystick.metrics import HTTP_REQUEST_SECONDS

REQUEST_ID = b"x-request-id"
# Whatever a proxy makes of it (a UUID, a ULID, a trace id), and nothing that could pass for a line of a log.
GOOD_ID = re.compile(rb"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")

# A label for each word that a stranger sends as a method would be a way to fill the memory.
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


class Observer:
    """The application, observed."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        # Random once: to ask the system for random bytes costs more than all else that an id needs.
        self._process = token_hex(4)
        self._numbers = count(1)
        # Finding a labelled histogram costs more than adding to it.
        self._seconds: dict[tuple[str, str, int], Histogram] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = scope["headers"]
        given = next((value for name, value in headers if name == REQUEST_ID), b"")
        request_id = given.decode() if GOOD_ID.fullmatch(given) else f"{self._process}{next(self._numbers):08x}"
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (REQUEST_ID, request_id.encode())]
            await send(message)

        bind_contextvars(request_id=request_id)
        started = perf_counter()
        try:
            if not tracing.is_on():
                await self.app(scope, receive, send_with_id)
                return
            with tracing.request_span(headers, request_id=request_id) as span:
                bind_contextvars(trace_id=tracing.trace_id(span))
                try:
                    await self.app(scope, receive, send_with_id)
                finally:
                    method, route = self._place(scope)
                    span.update_name(f"{method} {route}")
                    span.set_attributes(
                        {"http.request.method": method, "http.route": route, "http.response.status_code": status}
                    )
        finally:
            self._measure(scope, status, perf_counter() - started)
            # What this request has bound would be a lie in the lines of the next one of the same task.
            clear_contextvars()

    def _measure(self, scope: Scope, status: int, seconds: float) -> None:
        method, route = self._place(scope)
        key = (method, route, status // 100)
        histogram = self._seconds.get(key)
        if histogram is None:
            # Without a status the caller had hung up before there was an answer.
            named = f"{status // 100}xx" if status else "none"
            histogram = self._seconds[key] = HTTP_REQUEST_SECONDS.labels(method, route, named)
        histogram.observe(seconds)

    def _place(self, scope: Scope) -> tuple[str, str]:
        """The method and the route's template; `none` for a path that there is not."""
        method, route = scope["method"], scope.get("route")
        return method if method in METHODS else "other", "none" if route is None else route.path
