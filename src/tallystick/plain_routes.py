"""The routes that are called all the time, found and answered before FastAPI's own layers.

What FastAPI and Starlette put around a route (error pages, exit stacks, telemetry, a search through all routes) takes
longer than the work of these routes, and serves none of them.
"""

from collections.abc import Awaitable, Callable, Sequence

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match, Route
from starlette.types import ASGIApp, Receive, Scope, Send

AnswerError = Callable[[Request, Exception], Awaitable[Response]]


class PlainRoutes:
    """The application, with these of its routes answered here; `answer_error` makes an answer of what they raise.

    A path with another method, or one that is none of theirs, is left to the application. The routes' endpoints are
    coroutines that take a request and return a response.
    """

    def __init__(self, app: ASGIApp, routes: Sequence[Route], answer_error: AnswerError) -> None:
        self.app = app
        self.answer_error = answer_error
        self._exact = {route.path: route for route in routes if not route.param_convertors}
        self._patterns = [route for route in routes if route.param_convertors]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        route = self._find(scope) if scope["type"] == "http" else None
        if route is None:
            await self.app(scope, receive, send)
            return
        request = Request(scope, receive, send)
        try:
            response = await route.endpoint(request)
        except Exception as error:  # noqa: BLE001  the request's edge: whatever it is, the caller gets an answer
            response = await self.answer_error(request, error)
        await response(scope, receive, send)

    def _find(self, scope: Scope) -> Route | None:
        route = self._exact.get(scope["path"])
        match = Match.FULL if route is not None and scope["method"] in (route.methods or ()) else Match.PARTIAL
        if route is None:
            for route in self._patterns:
                match, found = route.matches(scope)
                if match is not Match.NONE:
                    scope.update(found)
                    break
            else:
                return None
        # For whoever observes: a path is known by its template, also where the method is none of it.
        scope["route"] = route
        return route if match is Match.FULL else None
