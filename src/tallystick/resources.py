"""What every flow needs, built once from the settings and passed down: settings, rules, PostgreSQL, Redis, Stripe."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

from redis.asyncio import Redis
from sqlalchemy.ext.asyncio import AsyncEngine
from stripe import StripeClient

from tallystick import db, redis_client, stripe_gateway, tracing
from tallystick.config import Settings
from tallystick.metrics import DATABASE_CONNECTIONS, DATABASE_POOL_SIZE
from tallystick.rules import RulesFile

# A server that hangs is not told goodbye.
CLOSE_WITHIN_SECONDS = 2


@dataclass(frozen=True)
class Resources:
    """The open connections of one process."""

    settings: Settings
    engine: AsyncEngine
    redis: Redis
    stripe: StripeClient
    rules: RulesFile
    meter_event_session: stripe_gateway.MeterEventSession


@asynccontextmanager
async def open_resources(settings: Settings, *, application_name: str) -> AsyncIterator[Resources]:
    """Build the clients, lend them, close them. A part may be down: nothing is connected before it is used."""
    rules = RulesFile(settings.rules_file)
    engine = db.create_engine(settings, application_name=application_name)
    redis = redis_client.create_redis(settings)
    stripe_connections = stripe_gateway.Connections(settings.stripe_timeout_seconds)
    stripe = stripe_gateway.create_stripe(settings, stripe_connections)
    DATABASE_POOL_SIZE.set(settings.database_pool_size)
    DATABASE_CONNECTIONS.set_function(engine.pool.checkedout)  # type: ignore[attr-defined]  # of the pool that it has
    try:
        with tracing.export_spans(settings.otel_endpoint, application_name):
            yield Resources(settings, engine, redis, stripe, rules, stripe_gateway.MeterEventSession(stripe))
    finally:
        with suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_WITHIN_SECONDS):
                await stripe_connections.close_async()
                await redis.aclose()
                await engine.dispose()
