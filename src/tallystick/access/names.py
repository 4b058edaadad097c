"""Names: customers that lost or regained one by what happened to another customer are told of it.

Whoever takes a name from a customer tells its own news and has not locked the other one. So the statements that write
names note those that may have moved (`changed_refs`), in their own transaction. This loop takes them, locks whoever
goes by them, and announces what differs from what was announced last.

What is noted goes only when all are told: a crash before that tells them again, which finds nothing new. Several
workers only look at the same twice.
"""

from collections.abc import Collection
from datetime import datetime

from sqlalchemy import text

from tallystick import db
from tallystick.mirror.apply import lock_customers
from tallystick.notifications.outbox import announce_changes
from tallystick.resources import Resources

# Their webhooks wait while a batch is told, so a batch is over in some tens of milliseconds.
CUSTOMERS_PER_TRANSACTION = 200
REFS_PER_BATCH = 500
BATCHES_PER_RUN = 20

READ_NOTED = text("SELECT number, ref FROM changed_refs ORDER BY number LIMIT :limit")

FORGET_NOTED = text("DELETE FROM changed_refs WHERE number = ANY(:numbers)")

# Whom the name {ref} means, or would mean without its link: of each kind of name only the first can be it. It is the
# first row of an index, however many share the name. (The other side of this, which names a customer has, is the view
# `customer_names`; tests/access/test_names.py compares them.)
MAY_MEAN = """
    SELECT customer FROM customer_links WHERE ref = {ref}
    UNION ALL
    (SELECT id FROM customers WHERE ref = {ref} AND NOT deleted AND account = ''
      ORDER BY mark_created DESC, id DESC LIMIT 1)
    UNION ALL
    (SELECT s.customer FROM checkout_sessions s JOIN customers c ON c.id = s.customer
      WHERE s.client_reference_id = {ref} AND NOT s.deleted AND s.account = '' AND NOT c.deleted AND c.account = ''
      ORDER BY s.mark_created DESC, s.id DESC LIMIT 1)
"""

# Those that may have a name now, and those that were told they have it. Where nobody has it, every deleted one that
# carries it keeps it. A campaign's code can be the name of very many customers, so only these few are looked at.
# (OFFSET 0 and LIMIT: looked up name by name, whatever statistics say.)
FIND_CONCERNED = text(f"""
    WITH noted AS (
        SELECT DISTINCT ref FROM unnest(CAST(:refs AS text[])) AS n(ref)
    ), meaning AS (
        SELECT n.ref, m.customer FROM noted n CROSS JOIN LATERAL ({MAY_MEAN.format(ref="n.ref")}) m
    ), nobodys AS MATERIALIZED (
        SELECT ref FROM noted EXCEPT SELECT ref FROM meaning
    )
    SELECT customer FROM meaning
    UNION
    SELECT a.customer
      FROM noted n
     CROSS JOIN LATERAL (
        SELECT customer FROM customer_access
         WHERE announced_refs @> ARRAY[n.ref] AND announced_refs <> '{{}}' OFFSET 0) a
    UNION
    SELECT k.customer
      FROM nobodys n
     CROSS JOIN LATERAL (
        SELECT id AS customer FROM customers WHERE ref = n.ref AND account = ''
        UNION ALL
        SELECT customer FROM checkout_sessions WHERE client_reference_id = n.ref AND NOT deleted AND account = '') k
     ORDER BY customer
""")  # noqa: S608  a constant


async def announce_names(resources: Resources, now: datetime) -> int:
    """Tell the customers whose names may have changed by others; how many names were looked at."""
    done = 0
    for _ in range(BATCHES_PER_RUN):
        async with db.transaction(resources.engine) as connection:
            noted = (await connection.execute(READ_NOTED, {"limit": REFS_PER_BATCH})).all()
            refs = sorted({row.ref for row in noted})
            customers = list(await connection.scalars(FIND_CONCERNED, {"refs": refs}))
        for first in range(0, len(customers), CUSTOMERS_PER_TRANSACTION):
            await _announce(resources, customers[first : first + CUSTOMERS_PER_TRANSACTION])
        async with db.transaction(resources.engine) as connection:
            await connection.execute(FORGET_NOTED, {"numbers": [row.number for row in noted]})
        done += len(refs)
        if len(noted) < REFS_PER_BATCH:
            break
    return done


async def _announce(resources: Resources, customers: Collection[str]) -> None:
    async with db.transaction(resources.engine) as connection:
        await lock_customers(connection, customers)
        await announce_changes(connection, customers)
