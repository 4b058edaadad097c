"""What a call to Stripe came to, in the three words that delivery acts on."""

from dataclasses import dataclass
from typing import Literal

import httpx
import stripe

from tallystick.stripe_gateway import error_code

ALREADY_SENT = "already exists with identifier"


@dataclass(frozen=True)
class Outcome:
    """`sent`; `retry`, with `unknown` when Stripe may have taken it all the same; or `parked`, with Stripe's reason."""

    state: Literal["sent", "retry", "parked"]
    reason: str | None = None
    unknown: bool = False


def read_outcome(error: stripe.StripeError) -> Outcome:
    """What an error of Stripe's SDK says about whether the meter event was taken.

    Only a refusal is certain. A connection that broke, a time-out or a 5xx leaves it open, and the retry repeats the
    identifier, which Stripe takes once (https://docs.stripe.com/api/billing/meter-event/create).
    """
    status = error.http_status
    reason = error_code(error) or type(error).__name__
    if isinstance(error, stripe.APIConnectionError):
        never_connected = isinstance(error.__cause__, httpx.ConnectError | httpx.ConnectTimeout | httpx.PoolTimeout)
        return Outcome("retry", type(error.__cause__ or error).__name__, unknown=not never_connected)
    if status == 400 and ALREADY_SENT in str(error.user_message or error):
        return Outcome("sent", "repeat")
    if status is None or status >= 500 or status == 409:
        return Outcome("retry", reason, unknown=True)
    if status in (401, 403, 429):
        # A wrong key is the operator's to mend, and the usage waits for it; a full lane empties by itself.
        return Outcome("retry", reason)
    return Outcome("parked", f"{reason}: {error.user_message or ''}"[:200])
