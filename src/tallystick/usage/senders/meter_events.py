"""The default sender: one v1 meter event a delivery."""

import uuid

import stripe
from stripe import StripeClient

from tallystick.usage.senders.outcomes import Outcome, read_outcome


async def send_meter_event(
    client: StripeClient, *, event_name: str, identifier: str, payload: dict[str, str], timestamp: int
) -> Outcome:
    """Create the meter event (https://docs.stripe.com/api/billing/meter-event/create).

    Everything that identifies it is given; only the Idempotency-Key is new for each try: Stripe replays the answer
    of an old one, a 500 or a 429 included, instead of doing the work.
    """
    try:
        await client.v1.billing.meter_events.create_async(
            {"event_name": event_name, "identifier": identifier, "payload": payload, "timestamp": timestamp},
            {"idempotency_key": str(uuid.uuid4())},
        )
    except stripe.StripeError as error:
        return read_outcome(error)
    return Outcome("sent")
