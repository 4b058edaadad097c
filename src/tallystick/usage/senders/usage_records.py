"""The sender for prices without a meter: usage records, which left Stripe's API in 2025-03-31.basil.

A record *sets* the quantity of the item at a second, so saying it again is harmless by nature, and the last one said is
right whatever came before. What is said is therefore the running quantity of the bucket, and not the delivery's own.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from urllib.parse import quote

import stripe
from stripe import StripeClient

from tallystick.usage.senders.outcomes import Message, Outcome, read_outcome

# The last version that has usage records, for accounts that still have them.
API_VERSION = "2025-02-24.acacia"


@dataclass(frozen=True)
class Record:
    """A delivery as a usage record: `item` is the subscription's, or None if it has none; `quantity` the bucket's."""

    message: Message
    item: str | None
    quantity: Decimal


async def send_usage_records(client: StripeClient, records: Sequence[Record], *, lanes: int) -> list[Outcome]:
    """Set the quantities, `lanes` at a time; an outcome for each, in order."""
    free = asyncio.Semaphore(lanes)

    async def send(record: Record) -> Outcome:
        if record.item is None:
            return Outcome("parked", "no_subscription_item")
        if record.quantity != record.quantity.to_integral_value() or record.quantity < 0:
            return Outcome("parked", "not_a_whole_number")
        async with free:
            return await _set(client, record.message, record.item, int(record.quantity))

    return await asyncio.gather(*(send(record) for record in records))


async def _set(client: StripeClient, message: Message, item: str, quantity: int) -> Outcome:
    try:
        answer = await client.raw_request_async(
            "post",
            f"/v1/subscription_items/{quote(item, safe='')}/usage_records",
            quantity=quantity,
            timestamp=message.timestamp,
            action="set",
            stripe_version=API_VERSION,
            idempotency_key=message.idempotency_key(),
        )
    except stripe.InvalidRequestError as error:
        outcome = read_outcome(error)
        # The item has gone on to its next period.
        closed = outcome.state == "parked" and error.param == "timestamp"
        return replace(outcome, reason="period_closed") if closed else outcome
    except stripe.StripeError as error:
        return read_outcome(error)
    return Outcome("sent", http_status=200, request_id=answer.request_id)
