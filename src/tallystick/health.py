"""`/healthz`, `/readyz` and `/metrics`: for the machine that runs the service, and so without an API key."""

import asyncio

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from sqlalchemy import text
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from tallystick import db, schema
from tallystick.metrics import REGISTRY
from tallystick.redis_client import REDIS_ERRORS
from tallystick.resources import Resources

CHECK_TIMEOUT_SECONDS = 3


async def get_health(request: Request) -> Response:
    """200 while the process answers at all. It asks no other part: a broken database must not get it killed."""
    return JSONResponse({"status": "ok"})


async def get_readiness(request: Request) -> Response:
    """200 when requests can be served, else 503; either way the state of each part.

    PostgreSQL is needed. Without Redis usage goes to the ledger directly, slower: the answer is 200 and says
    `degraded`.
    """
    resources: Resources = request.app.state.resources
    postgres, redis = await asyncio.gather(_check_postgres(resources), _check_redis(resources))
    ready = postgres == "ok"
    status = "ready" if ready and redis == "ok" else "degraded" if ready else "not ready"
    return JSONResponse(
        {"status": status, "parts": {"postgres": postgres, "redis": redis}}, status_code=200 if ready else 503
    )


async def get_metrics(request: Request) -> Response:
    """Prometheus's text format: this process's counters. The gauges of the queues are with the worker."""
    return Response(generate_latest(REGISTRY), media_type=CONTENT_TYPE_LATEST)


async def _check_postgres(resources: Resources) -> str:
    try:
        async with asyncio.timeout(CHECK_TIMEOUT_SECONDS), db.transaction(resources.engine) as connection:
            if await connection.scalar(text("SELECT pg_is_in_recovery()")):
                return "read-only"
            return "ok" if await schema.is_current(connection) else "migrations are missing: tallystick migrate"
    except db.STORAGE_ERRORS as error:
        return f"failed: {type(error).__name__}"


async def _check_redis(resources: Resources) -> str:
    try:
        async with asyncio.timeout(CHECK_TIMEOUT_SECONDS):
            await resources.redis.ping()
            return "ok"
    except REDIS_ERRORS as error:
        return f"failed: {type(error).__name__}"
