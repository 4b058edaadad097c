"""Requests to seal a customer's usage at once, written with the webhook that told of its draft invoice.

Usage is billed while the invoice is a draft, an hour by default: waiting for the next regular seal could be too late.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from tallystick import db

# clock_timestamp(), not now(): a request that is repeated while the first is being answered must not look like it.
REQUEST_SEALS = text("""
    INSERT INTO seal_requests (customer, invoice, requested_at)
    SELECT customer, invoice, clock_timestamp()
      FROM json_to_recordset(CAST(:rows AS json)) AS r(customer text, invoice text) ORDER BY customer
    ON CONFLICT (customer) DO UPDATE SET invoice = excluded.invoice, requested_at = excluded.requested_at
""")

READ_REQUESTS = text("SELECT customer, requested_at FROM seal_requests ORDER BY requested_at LIMIT 500")

FORGET_REQUEST = text("DELETE FROM seal_requests WHERE customer = :customer AND requested_at = :requested_at")


async def request_seals(connection: db.Connection, drafts: Mapping[str, str]) -> None:
    """Ask for customers' usage to be sealed; `drafts` maps each customer to its draft invoice. The caller commits."""
    if drafts:
        rows = [{"customer": customer, "invoice": invoice} for customer, invoice in drafts.items()]
        await connection.execute(REQUEST_SEALS, {"rows": json.dumps(rows)})


async def read_requests(connection: AsyncConnection) -> Sequence[Any]:
    """The oldest requests: `customer` and `requested_at` of each."""
    return (await connection.execute(READ_REQUESTS)).all()


async def forget_requests(connection: AsyncConnection, requests: Sequence[Any]) -> None:
    """Remove requests that were answered, unless they were made again meanwhile. The caller commits."""
    for request in requests:
        await connection.execute(FORGET_REQUEST, request._asdict())
