"""A database that was restored from a backup: how it is noticed, and what is done at once.

Every minute a worker raises a mark in PostgreSQL and then writes it to Redis. A PostgreSQL whose mark is below Redis's
has lost commits. Redis still knows the ids of usage that the ledger has lost, and would answer `duplicate` when it is
sent again; so these ids are forgotten. That doubles nothing: the ledger's own key decides (docs/operations.md#restore).
"""

from datetime import datetime

import structlog
from sqlalchemy import text

from tallystick import db
from tallystick.metrics import DATABASE_RESTORED
from tallystick.redis_client import KEY_TAG
from tallystick.resources import Resources
from tallystick.usage.buffer import forget_ids

log = structlog.get_logger()

MARK_KEY = f"{KEY_TAG}:usage:mark"

RAISE_MARK = text("UPDATE installation SET mark = mark + 1 WHERE mark >= :remembered RETURNING mark")
READ_MARK = text("SELECT mark FROM installation")


async def compare_marks(resources: Resources, now: datetime) -> int:
    """Raise the mark, or forget the ids in Redis if this database is older than Redis: how often that was (0 or 1).

    Raises what PostgreSQL and Redis raise.
    """
    remembered = int(await resources.redis.get(MARK_KEY) or 0)
    async with db.transaction(resources.engine) as connection:
        mark = await connection.scalar(RAISE_MARK, {"remembered": remembered})
        restored = mark is None
        if restored:
            mark = await connection.scalar(READ_MARK)
    if restored:
        number = await forget_ids(resources.redis)
        DATABASE_RESTORED.inc()
        log.error("database_restored", mark=mark, remembered=remembered, generations=number, at=now.isoformat())
    # Died here: Redis's mark is too low by one, or the ids are forgotten once more. A restore is noticed all the same.
    await resources.redis.set(MARK_KEY, mark)
    return int(restored)
