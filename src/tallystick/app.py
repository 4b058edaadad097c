"""The HTTP application: routers, what is open while it runs, and errors as `application/problem+json` (RFC 9457)."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import structlog
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from sqlalchemy.exc import SQLAlchemyError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tallystick import __version__, health
from tallystick.access import links as access_links
from tallystick.access import routes as access_routes
from tallystick.auth import KeyCache
from tallystick.config import Settings
from tallystick.db import is_storage_failure
from tallystick.errors import PROBLEM_MEDIA_TYPE, InvalidRequest, NotFound, Problem, Unavailable
from tallystick.openapi import describe_plain_routes
from tallystick.portal import sessions as portal_sessions
from tallystick.resources import open_resources
from tallystick.usage import routes as usage_routes
from tallystick.usage.ingest import Breaker, receive_usage
from tallystick.usage.meters import MeterCache
from tallystick.webhooks import routes as webhook_routes
from tallystick.webhooks.inbox import Inbox, receive_webhook

log = structlog.get_logger()


def create_app(settings: Settings) -> FastAPI:
    """The application over these settings. Nothing is connected before it starts up."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with open_resources(settings, application_name="tallystick api") as resources:
            app.state.resources = resources
            app.state.keys = KeyCache()
            app.state.meters = MeterCache()
            app.state.breaker = Breaker()
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
        exception_handlers={
            Problem: answer_problem,
            RequestValidationError: answer_invalid,
            HTTPException: answer_http_error,
            SQLAlchemyError: answer_storage_error,
            OSError: answer_storage_error,
            Exception: answer_bug,
        },
    )
    # The two hot routes are plain ones: a decorated route spends more on its signature than these on their work.
    app.router.routes.append(Route("/webhooks/stripe", receive_webhook, methods=["POST"]))
    app.router.routes.append(Route("/webhooks/stripe/{endpoint}", receive_webhook, methods=["POST"]))
    app.router.routes.append(Route("/v1/usage", receive_usage, methods=["POST"]))
    app.router.routes.append(Route("/healthz", health.get_health, methods=["GET"]))
    app.router.routes.append(Route("/readyz", health.get_readiness, methods=["GET"]))
    app.router.routes.append(Route("/metrics", health.get_metrics, methods=["GET"]))
    app.include_router(usage_routes.router)
    app.include_router(access_routes.router)
    app.include_router(access_links.router)
    app.include_router(webhook_routes.router)
    app.include_router(portal_sessions.router)
    describe_plain_routes(app)
    return app


async def answer_problem(request: Request, error: Exception) -> Response:
    """An error raised on purpose."""
    assert isinstance(error, Problem)
    return JSONResponse(error.body(), error.status, dict(error.headers()), PROBLEM_MEDIA_TYPE)


async def answer_invalid(request: Request, error: Exception) -> Response:
    """A body or parameter that FastAPI refused: the first field to blame, and all of them in `errors`."""
    assert isinstance(error, RequestValidationError)
    found = [{"field": _field(problem["loc"]), "message": str(problem["msg"])} for problem in error.errors()]
    problem = InvalidRequest(found[0]["message"], field=found[0]["field"])
    return JSONResponse(problem.body() | {"errors": found}, problem.status, media_type=PROBLEM_MEDIA_TYPE)


def _field(location: Any) -> str:
    # ("query", "from") → from; ("body",) → body; ("body", "customer") → customer
    return ".".join(str(part) for part in location[1:]) or str(location[0])


async def answer_http_error(request: Request, error: Exception) -> Response:
    """Starlette's own: no such path, no such method."""
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        return await answer_problem(request, NotFound(f"There is no {request.url.path!a}; see /docs."))
    problem = InvalidRequest(error.detail, status=error.status_code, type="http-error")
    return JSONResponse(problem.body(), problem.status, error.headers, PROBLEM_MEDIA_TYPE)


async def answer_storage_error(request: Request, error: Exception) -> Response:
    """PostgreSQL failed while it was needed: nothing was stored, and trying again may help."""
    if not is_storage_failure(error):
        return await answer_bug(request, error)
    log.warning("storage_failed", path=request.url.path, error=type(error).__name__)
    return await answer_problem(request, Unavailable("PostgreSQL is not available.", retry_after_seconds=2))


async def answer_bug(request: Request, error: Exception) -> Response:
    """Anything unforeseen: no detail leaves the service; the log has the traceback."""
    log.error("request_failed", path=request.url.path, exc_info=error)
    return await answer_problem(request, Problem())
