"""What a sender is given, and what a call to Stripe came to in the three words that delivery acts on."""

import secrets
from dataclasses import dataclass
from typing import Literal, NamedTuple

import stripe

from tallystick.stripe_gateway import error_code, never_reached, request_id

# A repeat is refused by v2 with a code, and by v1 in these words and with no code at all.
DUPLICATE = "duplicate_meter_event"
ALREADY_SENT = "already exists with identifier"


class Message(NamedTuple):
    """What is to be said of a delivery: the same in each try, but for `attempt`, the number of the try."""

    event_name: str
    identifier: str
    payload: dict[str, str]
    timestamp: int
    attempt: int

    def idempotency_key(self) -> str:
        """New for each try: Stripe replays the answer of an old one, a 500 or a 429 included, instead of working.

        An error report names the call by its key, so the delivery can be read from it (`usage/error_reports.py`).
        """
        return f"{self.identifier}.{self.attempt}.{secrets.token_hex(2)}"


@dataclass(frozen=True)
class Outcome:
    """`sent`; `retry`, with `unknown` when Stripe may have taken it all the same; or `parked`, with Stripe's reason."""

    state: Literal["sent", "retry", "parked"]
    reason: str | None = None
    unknown: bool = False
    http_status: int | None = None
    request_id: str | None = None


def read_outcome(error: stripe.StripeError) -> Outcome:
    """What an error of Stripe's SDK says about whether what was said was taken.

    Only a refusal in Stripe's own words is certain. A connection that broke, a time-out, a 5xx or an answer that is not
    Stripe's (of a proxy, whatever its status) leaves it open, and the retry repeats the identifier, which Stripe takes
    once (https://docs.stripe.com/api/billing/meter-event/create).
    """
    status, answered = error.http_status, request_id(error)
    reason = error_code(error) or type(error).__name__
    if isinstance(error, stripe.APIConnectionError):
        return Outcome("retry", type(error.__cause__ or error).__name__, unknown=not never_reached(error))
    if status == 400 and (reason == DUPLICATE or ALREADY_SENT in str(error.user_message or error)):
        return Outcome("sent", "repeat", http_status=status, request_id=answered)
    if isinstance(error, stripe.RateLimitError) or (status in (401, 403) and not isinstance(error, stripe.APIError)):
        # A wrong key is the operator's to mend, and the usage waits for it; a full lane empties by itself.
        return Outcome("retry", reason, http_status=status, request_id=answered)
    # The SDK's name for all that has no name of its own: 409, 5xx, and what cannot be read as Stripe's.
    if isinstance(error, stripe.APIError) or status is None or status >= 500 or status == 409:
        return Outcome("retry", reason, unknown=True, http_status=status, request_id=answered)
    said = f"{reason}: {error.user_message}" if error.user_message else reason
    return Outcome("parked", said[:200], http_status=status, request_id=answered)
