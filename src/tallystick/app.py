"""The HTTP application: routers, what is open while it runs, and errors as `application/problem+json` (RFC 9457)."""

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

import structlog
from fastapi import Depends, FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from tallystick import __version__, db, health
from tallystick.access import links as access_links
from tallystick.access import routes as access_routes
from tallystick.auth import KeyCache
from tallystick.bodies import Arriving, BodyRefused, LimitedBodies
from tallystick.browsers import Browsers
from tallystick.config import Settings
from tallystick.crowd import Crowd
from tallystick.db import is_storage_failure
from tallystick.end_users import EndUsers
from tallystick.errors import PROBLEM_MEDIA_TYPE, InvalidRequest, NotFound, Problem, Unavailable, Unsupported
from tallystick.json_faults import explain
from tallystick.limits import Limiter
from tallystick.logs import describe_error
from tallystick.observer import Observer
from tallystick.openapi import describe_plain_routes
from tallystick.plain_routes import PlainRoutes
from tallystick.portal import sessions as portal_sessions
from tallystick.redis_client import REDIS_ERRORS
from tallystick.reference import reference_route
from tallystick.resources import Resources, open_resources
from tallystick.usage import correction_routes, parked_routes, quota
from tallystick.usage import routes as usage_routes
from tallystick.usage.buffer import Buffer
from tallystick.usage.ingest import Breaker, receive_usage
from tallystick.usage.meters import MeterCache
from tallystick.usage.restored import compare_marks
from tallystick.webhooks import routes as webhook_routes
from tallystick.webhooks.inbox import Inbox, receive_webhook

log = structlog.get_logger()

# What pages in a browser call themselves, if TALLYSTICK_CORS_ORIGINS names them; all else is for services.
CORS_ROUTES = {"/v1/portal/sessions": "POST"}
# The largest body of a route below: a hundred references of a hundred characters, each of them escaped.
MAX_JSON_BYTES = 256 * 1024

# What bodies that are still arriving may hold of a process's memory. Each kind has its own share, so that none of them
# can use up another's. Usage is read from holders of a key only, the other two from anybody.
ARRIVING_USAGE_BYTES = 64 * 2**20
ARRIVING_WEBHOOK_BYTES = 32 * 2**20
ARRIVING_JSON_BYTES = 16 * 2**20


def create_app(settings: Settings) -> FastAPI:
    """The application over these settings. Nothing is connected before it starts up."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with open_resources(settings, application_name="tallystick api") as resources:
            app.state.resources = resources
            app.state.keys = KeyCache()
            app.state.end_users = EndUsers(settings)
            app.state.portal_limiter = Limiter()
            app.state.access_reader = access_routes.AccessReader(resources.engine)
            app.state.meters = MeterCache()
            app.state.breaker = Breaker()
            app.state.arriving_usage = Arriving(ARRIVING_USAGE_BYTES)
            app.state.arriving_webhooks = Arriving(ARRIVING_WEBHOOK_BYTES)
            app.state.buffer = Buffer(resources.redis, settings)
            await notice_restore(resources)
            app.state.inbox = Inbox(resources)
            await app.state.inbox.start()
            try:
                yield
            finally:
                await app.state.inbox.stop()

    app = FastAPI(
        title="tallystick",
        version=__version__,
        summary="Usage-based billing beside Stripe: what was accepted is billed exactly once, and it can be proved.",
        lifespan=lifespan,
        # Its own traces carry paths and queries, and with them references (tracing.py).
        telemetry={"tracing": False, "metrics": False, "logs": False, "auto_configure": False},
        docs_url=None,  # FastAPI's own page loads scripts from elsewhere
        redoc_url=None,
        exception_handlers={
            Problem: answer_problem,
            RequestValidationError: answer_invalid,
            HTTPException: answer_http_error,
            **dict.fromkeys(db.STORAGE_ERRORS, answer_storage_error),
            Exception: answer_bug,
        },
    )
    plain_routes = [
        Route("/webhooks/stripe", receive_webhook, methods=["POST"]),
        Route("/webhooks/stripe/{endpoint}", receive_webhook, methods=["POST"]),
        Route("/v1/usage", receive_usage, methods=["POST"]),
        Route("/v1/customers/{ref}/access", access_routes.get_access, methods=["GET"]),
        Route("/healthz", health.get_health, methods=["GET"]),
        Route("/readyz", health.get_readiness, methods=["GET"]),
        Route("/metrics", health.get_metrics, methods=["GET"]),
        reference_route(app),
    ]
    # FastAPI answers another method on their paths with 405.
    app.router.routes += plain_routes
    for routes in (
        usage_routes,
        correction_routes,
        quota,
        parked_routes,
        access_routes,
        access_links,
        webhook_routes,
        portal_sessions,
    ):
        app.include_router(routes.router, dependencies=[Depends(refuse_unknown_parameters)])
    describe_plain_routes(app)

    # Around all that FastAPI builds: an answer to an unforeseen error is one of its answers too.
    build: Callable[[], ASGIApp] = app.build_middleware_stack

    def build_around() -> ASGIApp:
        limited = LimitedBodies(build(), MAX_JSON_BYTES, Arriving(ARRIVING_JSON_BYTES))
        inner = PlainRoutes(limited, plain_routes, answer_error)
        return Observer(Browsers(Crowd(inner), settings.cors_origins, CORS_ROUTES))

    app.build_middleware_stack = build_around  # type: ignore[method-assign]
    return app


def refuse_unknown_parameters(request: Request) -> None:
    """Raise `InvalidRequest` for a query parameter that the route does not know: misspelt, it would be left out."""
    if not request.query_params:
        return
    known = [parameter.alias for parameter in request.scope["route"].dependant.query_params]
    for name in request.query_params:
        if name not in known:
            there_are = f"there are: {', '.join(known)}" if known else "there is none"
            raise InvalidRequest(f"There is no query parameter {name!a}; {there_are}.", field=name)


async def notice_restore(resources: Resources) -> None:
    """Before the first request: a restored PostgreSQL must not have repeats of what it has lost called duplicates."""
    try:
        await compare_marks(resources, datetime.now(UTC))
    except (*db.STORAGE_ERRORS, *REDIS_ERRORS) as error:
        log.warning("marks_not_compared", error=type(error).__name__)  # a part is away; the worker compares later


async def answer_error(request: Request, error: Exception) -> Response:
    """The answer to what a plain route raised, as FastAPI finds it for the others by the table in `create_app`."""
    if isinstance(error, Problem):
        return await answer_problem(request, error)
    if isinstance(error, HTTPException):
        return await answer_http_error(request, error)
    if isinstance(error, db.STORAGE_ERRORS):
        return await answer_storage_error(request, error)
    return await answer_bug(request, error)


async def answer_problem(request: Request, error: Exception) -> Response:
    """An error raised on purpose."""
    assert isinstance(error, Problem)
    return error.answer()


async def answer_invalid(request: Request, error: Exception) -> Response:
    """A body or parameter that FastAPI refused: the first field to blame, and all of them in `errors`."""
    assert isinstance(error, RequestValidationError)
    if isinstance(error.__cause__, ValueError):
        return _answer_unreadable(request, error.__cause__)
    problems = error.errors()
    if any(problem["loc"] == ("body",) and isinstance(problem.get("input"), bytes) for problem in problems):
        return NOT_SAID_TO_BE_JSON.answer()
    found = [{"field": _field(problem["loc"]), "message": _say_plainly(problem)} for problem in problems]
    problem = InvalidRequest(found[0]["message"], field=found[0]["field"])
    return JSONResponse(problem.body() | {"errors": found}, problem.status, media_type=PROBLEM_MEDIA_TYPE)


NOT_SAID_TO_BE_JSON = Unsupported(
    "Send the body with the header Content-Type: application/json.",
    type="unsupported-media-type",
    header=("Accept", "application/json"),
)
A_TIME = "It must be a time with its zone, as 2026-11-01T00:00:00Z; in a URL, + is written as %2B."


def _say_plainly(problem: Mapping[str, Any]) -> str:
    """What is wrong with a value: pydantic's words, where those do not speak of Python."""
    if problem["type"].startswith(("datetime_", "timezone_")):
        return A_TIME
    if problem["type"] == "model_attributes_type":
        return "It must be a JSON object."
    if problem["type"] == "extra_forbidden":
        return "There is no such field."
    return str(problem["msg"]).removeprefix("Value error, ")


def _field(location: Any) -> str:
    # ("query", "from") → from; ("body",) → body; ("body", "customer") → customer
    return ".".join(str(part) for part in location[1:]) or str(location[0])


def _answer_unreadable(request: Request, cause: Exception) -> Response:
    """A body that is no JSON: FastAPI raises the parser's error with one of its own."""
    reason, field = explain(b"".join(request.scope["tallystick.body"]), cause)
    return InvalidRequest(
        f"The body is not valid JSON: {reason}.", field=field, type="invalid-json", status=400
    ).answer()


async def answer_http_error(request: Request, error: Exception) -> Response:
    """Starlette's own: no such path, no such method; and what was found while a body was read."""
    assert isinstance(error, HTTPException)
    if isinstance(error, BodyRefused):
        return await answer_problem(request, error.problem)
    if error.status_code == 404:
        return await answer_problem(request, NotFound(f"There is no {request.url.path!a}; see /docs."))
    if isinstance(error.__cause__, ValueError | RecursionError):
        return _answer_unreadable(request, error.__cause__)
    if error.status_code == 405:
        return _answer_wrong_method(request, error)
    problem = InvalidRequest(error.detail, status=error.status_code, type="http-error")
    return JSONResponse(problem.body(), problem.status, error.headers, PROBLEM_MEDIA_TYPE)


def _answer_wrong_method(request: Request, error: HTTPException) -> Response:
    # Each route of a path knows only its own method; whoever answers is to name all (RFC 9110, 15.5.6).
    operations = request.app.openapi()["paths"].get(_route(request), {})
    own = (error.headers or {}).get("Allow", "").split(", ")
    methods = ", ".join(sorted({*own, *(method.upper() for method in operations)}))
    problem = InvalidRequest(
        f"There is no {request.method!a} here; there are: {methods}.", status=405, type="http-error"
    )
    return JSONResponse(problem.body(), problem.status, {"Allow": methods}, PROBLEM_MEDIA_TYPE)


async def answer_storage_error(request: Request, error: Exception) -> Response:
    """PostgreSQL failed while it was needed: nothing was stored, and trying again may help."""
    if not is_storage_failure(error):
        return await answer_bug(request, error)
    log.warning("storage_failed", route=_route(request), error=type(error).__name__)
    return await answer_problem(request, Unavailable("PostgreSQL is not available.", retry_after_seconds=2))


async def answer_bug(request: Request, error: Exception) -> Response:
    """Anything unforeseen: no detail leaves the service; the log has its class and the lines of code."""
    log.error("request_failed", route=_route(request), **describe_error(error))
    return await answer_problem(request, Problem())


def _route(request: Request) -> str:
    # The path itself may hold a customer's reference, which is nobody's business in a log.
    return str(getattr(request.scope.get("route"), "path", "none"))
