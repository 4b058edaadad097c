"""How many calls a second Stripe is sent: token buckets in PostgreSQL, shared by all workers.

What is told takes what is there. What is asked (reconciliation) takes from the same bucket, and only what telling
leaves: usage has to reach Stripe before its invoice is final, and a question can be put off.
"""

import asyncio
import random
from decimal import Decimal

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from tallystick import db
from tallystick.resources import Resources

# What a second adds is the limit, and a pause saves up at most one second of it; two calls at least, or asking could
# leave nothing. After a failover PostgreSQL's clock may be behind the last refill: nothing is taken away for that, and
# from now on it counts from the earlier moment.
REFILL = text("""
    INSERT INTO rate_limits AS l (name, tokens, refilled_at)
    VALUES (:name, greatest(2, :per_second), clock_timestamp())
    ON CONFLICT (name) DO UPDATE SET
        tokens = least(greatest(2, :per_second),
                       l.tokens + :per_second * greatest(0, extract(epoch FROM clock_timestamp() - l.refilled_at))),
        refilled_at = clock_timestamp()
    RETURNING tokens
""")

TAKE = text("UPDATE rate_limits SET tokens = tokens - :used WHERE name = :name")


async def refill(connection: AsyncConnection, name: str, per_second: int) -> Decimal:
    """How many calls, or deliveries of the stream, may be made now. The bucket is locked until the caller commits."""
    found = await connection.execute(REFILL, {"name": name, "per_second": per_second})
    return Decimal(found.scalar_one())


async def take(connection: AsyncConnection, name: str, used: int) -> None:
    """Take what was used of a bucket that the caller has just refilled."""
    await connection.execute(TAKE, {"name": name, "used": used})


async def wait_to_ask(resources: Resources) -> None:
    """Return once Stripe may be asked something: when half a second's calls are there, and one is left in any case."""
    per_second = resources.settings.stripe_calls_per_second
    enough = max(Decimal(2), Decimal(per_second) / 2)
    while True:
        async with db.transaction(resources.engine) as connection:
            there = await refill(connection, "stripe", per_second)
            if there >= enough:
                await take(connection, "stripe", 1)
                return
        # As long as what is missing takes to come; and all who wait must not come at the same moment.
        missing = max(1, int(enough - there))
        await asyncio.sleep(missing / per_second * random.uniform(1, 2))
