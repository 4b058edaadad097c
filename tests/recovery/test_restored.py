"""A database that is older than what Redis remembers is noticed, and usage that it has lost can be sent again."""

from datetime import UTC, datetime, timedelta

import httpx
from fastapi import FastAPI
from sqlalchemy import text

from tallystick import db
from tallystick.resources import Resources
from tallystick.usage.buffer import IDS
from tallystick.usage.drain import drain
from tallystick.usage.restored import MARK_KEY, compare_marks
from tests.usage.making import conservation, make_meter

NOW = datetime.now(UTC)
EVENT = {"id": "e1", "customer": "acme", "meter": "calls", "timestamp": (NOW - timedelta(hours=1)).isoformat()}


async def lose_what_was_committed(resources: Resources) -> None:
    """As if a backup from before the last minute had been restored, without the usage of that time."""
    async with db.transaction(resources.engine) as connection:
        await connection.execute(text("UPDATE installation SET mark = mark - 1"))
        await connection.execute(text("DELETE FROM usage_events"))
        await connection.execute(text("DELETE FROM usage_totals"))


async def test_the_ids_of_usage_that_was_lost_are_forgotten_and_what_waits_stays(
    client: httpx.AsyncClient, resources: Resources
) -> None:
    await make_meter(resources, "calls")
    for _ in range(2):
        assert await compare_marks(resources, NOW) == 0
    assert (await client.post("/v1/usage", json=EVENT)).json()["accepted"] == 1
    await lose_what_was_committed(resources)
    assert (await client.post("/v1/usage", json=EVENT)).json()["duplicates"] == 1

    assert await compare_marks(resources, NOW) == 1
    assert (await client.post("/v1/usage", json=EVENT)).json()["accepted"] == 1
    await drain(resources, NOW)  # the copy that waited, and the repeat
    assert (await conservation(resources)).events == 1

    # Noticed once, not again and again.
    assert await compare_marks(resources, NOW) == 0
    assert [key async for key in resources.redis.scan_iter(f"{IDS}:*")]


async def test_the_api_notices_it_before_its_first_request(app: FastAPI, resources: Resources) -> None:
    await resources.redis.set(f"{IDS}:1:1", "ids of before")
    await lose_what_was_committed(resources)
    async with app.router.lifespan_context(app):
        assert not await resources.redis.exists(f"{IDS}:1:1")


async def test_a_redis_that_remembers_nothing_is_no_restore(resources: Resources) -> None:
    await compare_marks(resources, NOW)
    await resources.redis.delete(MARK_KEY)
    assert await compare_marks(resources, NOW) == 0
