"""Taking a meter event back: Stripe cancels one by its identifier, within 24 hours of its receipt."""

import uuid

import stripe
from stripe import StripeClient

from tallystick.usage.senders.outcomes import Outcome, read_outcome

ALREADY_CANCELLED = ("already", "cancel")


async def cancel_meter_event(client: StripeClient, *, event_name: str, identifier: str) -> Outcome:
    """Cancel the meter event (https://docs.stripe.com/api/billing/meter-event-adjustment/create).

    `sent`: it is cancelled, by this call or by an earlier one; `parked`: Stripe refuses; `retry`: nobody knows.
    """
    try:
        await client.v1.billing.meter_event_adjustments.create_async(
            {"event_name": event_name, "type": "cancel", "cancel": {"identifier": identifier}},
            {"idempotency_key": str(uuid.uuid4())},
        )
    except stripe.StripeError as error:
        outcome = read_outcome(error)
        words = str(error.user_message or error).lower()
        if outcome.state == "parked" and all(word in words for word in ALREADY_CANCELLED):
            return Outcome("sent", "repeat")
        return outcome
    return Outcome("sent")
