"""Stripe's SDK: one client, pinned version, and its errors translated once."""

from typing import Any, Final

import stripe
from stripe import StripeClient

from tallystick.config import Settings
from tallystick.errors import Problem, StripeRefused, Unavailable

# The version that stripe 16.1 was generated for; every answer has its shape, whatever the account's default is.
API_VERSION: Final = "2026-10-28.endive"

STRIPE_ERRORS = (stripe.StripeError,)


def create_http_client(settings: Settings) -> stripe.HTTPXClient:
    """The connections to Stripe, to be closed with `close`."""
    return stripe.HTTPXClient(timeout=settings.stripe_timeout_seconds)


async def close(http_client: stripe.HTTPXClient) -> None:
    """Close the connections to Stripe."""
    await http_client.close_async()


def create_stripe(settings: Settings, http_client: stripe.HTTPXClient) -> StripeClient:
    """A client for the account of `STRIPE_API_KEY`. It does not retry: each flow decides what a retry repeats."""
    base = settings.stripe_api_base
    meter_events_base = settings.stripe_meter_events_base or (
        stripe.DEFAULT_METER_EVENTS_API_BASE if base == stripe.DEFAULT_API_BASE else base
    )
    return StripeClient(
        settings.stripe_api_key.get_secret_value(),
        stripe_version=API_VERSION,
        base_addresses={"api": base, "meter_events": meter_events_base},
        max_network_retries=0,
        http_client=http_client,
    )


def error_code(error: stripe.StripeError) -> str | None:
    """Stripe's code for an error. `error.code` is empty for rate limits and idempotency errors; the body is not."""
    body: Any = getattr(error, "error", None)
    return error.code or getattr(body, "code", None) or getattr(body, "type", None)


def is_missing(error: stripe.StripeError, parameter: str) -> bool:
    """Whether Stripe does not know the object that a parameter named."""
    named: Any = getattr(error, "param", None)
    return error_code(error) == "resource_missing" and named == parameter


def refused_parameter(error: stripe.StripeError) -> str | None:
    """The parameter that Stripe refused to take, as it names it; None when something else was wrong."""
    return error.param if isinstance(error, stripe.InvalidRequestError) else None


def to_problem(error: stripe.StripeError) -> Problem:
    """What to answer when a request needed Stripe: 503 where waiting may help, else 502 with Stripe's code."""
    status = error.http_status
    if isinstance(error, stripe.APIConnectionError) or status is None or status == 429 or status >= 500:
        return Unavailable(
            "Stripe did not answer as it should; try again.", type="stripe-unavailable", retry_after_seconds=5
        )
    return StripeRefused(f"Stripe answered {status} {error_code(error) or 'without a code'}.")
