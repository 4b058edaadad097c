"""The default sender: one v1 meter event a delivery."""

import asyncio
from collections.abc import Sequence
from time import monotonic

import stripe
from stripe import StripeClient

from tallystick.stripe_gateway import request_id
from tallystick.usage.senders.outcomes import Message, Outcome, read_outcome


async def send_meter_events(
    client: StripeClient, messages: Sequence[Message], *, lanes: int, seconds: int
) -> list[Outcome]:
    """Create the meter events, `lanes` at a time; an outcome for each, in order.

    After `seconds` no further call is begun: a process that was stopped for a day and goes on must not say what another
    has said since, for Stripe would no longer know it for a repeat.
    """
    free = asyncio.Semaphore(lanes)
    until = monotonic() + seconds

    async def send(message: Message) -> Outcome:
        async with free:
            if monotonic() > until:
                return Outcome("retry", "out_of_time")
            return await send_meter_event(client, message)

    return await asyncio.gather(*(send(message) for message in messages))


async def send_meter_event(client: StripeClient, message: Message) -> Outcome:
    """Create one meter event (https://docs.stripe.com/api/billing/meter-event/create)."""
    try:
        taken = await client.v1.billing.meter_events.create_async(
            {
                "event_name": message.event_name,
                "identifier": message.identifier,
                "payload": message.payload,
                "timestamp": message.timestamp,
            },
            {"idempotency_key": message.idempotency_key()},
        )
    except stripe.StripeError as error:
        return read_outcome(error)
    return Outcome("sent", http_status=200, request_id=request_id(taken))
