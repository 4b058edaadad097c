"""What can be set on a running fake Stripe, by `POST /_fake/settings`."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from tallystick.dev.fake_stripe.errors import invalid

HOUR_SECONDS = 3600
DAY_SECONDS = 86_400


@dataclass
class Settings:
    """All times are seconds on the account's clock unless a name says otherwise."""

    finalization_delay_seconds: int = HOUR_SECONDS
    """How long an invoice stays a draft after its `invoice.created` was answered with 2xx. Stripe: 1 hour, up to 72."""

    after_last_retry: str = "unpaid"
    """What becomes of a subscription whose payment failed on every retry: `unpaid`, `canceled` or `past_due`."""

    upcoming_invoice_days: int = 7
    """How many days before a period ends `invoice.upcoming` is sent; not in shorter periods. 0 switches it off."""

    summary_lag_seconds: int = 0
    """How long after its receipt a meter event shows up in summaries. Invoices never lag."""

    error_report_seconds: int = 60
    """How long errors of meter events are gathered before a thin event reports them."""

    one_call_per_customer_and_meter: bool = True
    """Whether a second meter event for a customer and meter is refused while the first is in progress (429)."""

    meter_event_milliseconds: int = 0
    """Real time that a v1 meter event takes; the customer and meter are locked meanwhile."""

    rate_limit_per_second: int = 0
    """Calls accepted in a second of real time, over all keys; more get 429. 0: no limit. Stripe: 100, test 25."""

    meter_event_rate_limit_per_second: int = 0
    """The same for v1 meter events alone. Stripe: 1,000 in live mode."""

    stream_refuses_repeats: bool = False
    """Whether the stream refuses a request with an identifier that was taken. Stripe does not say what it does."""

    portal_default_configuration: bool = True
    """Whether the customer portal has a default configuration; without one a session needs `configuration`."""

    def change(self, values: dict[str, Any]) -> None:
        """Takes new values. Raises StripeError 400 for a name or a type that does not fit, and changes nothing then."""
        known = {field.name: type(field.default) for field in fields(self)}
        for name, value in values.items():
            if name not in known:
                raise invalid(f"There is no setting {name}. There are: {', '.join(known)}.", param=name)
            if type(value) is not known[name] or (isinstance(value, int) and value < 0):
                raise invalid(f"{name} is a {known[name].__name__}, not below 0.", param=name)
        after = values.get("after_last_retry", self.after_last_retry)
        if after not in ("unpaid", "canceled", "past_due"):
            raise invalid("after_last_retry is unpaid, canceled or past_due.", param="after_last_retry")
        for name, value in values.items():
            setattr(self, name, value)
