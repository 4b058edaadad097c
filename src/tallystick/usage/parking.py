"""Parked deliveries: usage that Stripe will not be told as it is. Why, what to do, and the product hears of each."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

from sqlalchemy.ext.asyncio import AsyncConnection

from tallystick.notifications.outbox import Notification, queue_notifications


class Reason(NamedTuple):
    """What happened, and what one can do about it."""

    happened: str
    remedy: str


SETTLE_OR = "settle it by an invoice item at Stripe, or void it"
CARRY_OR = f"carry it into the open period (`resend --carry`), {SETTLE_OR}"

# Our own reasons, and Stripe's codes that are known; docs/deliveries.md has the same table.
PARKED: Mapping[str, Reason] = {
    "period_closed": Reason("The invoice that would have billed it is final.", CARRY_OR),
    "older_than_35_days": Reason("Stripe takes no usage that is older than 35 days.", CARRY_OR),
    "outcome_unknown": Reason(
        "A try was not answered, and 23 hours later nobody knew whether Stripe had taken it.",
        "wait: Stripe's summaries settle it within a day; `tallystick reconcile --stripe` asks them now",
    ),
    "no_second_left": Reason(
        "The last second of the billing period says another value already, and Stripe could not tell the two apart.",
        "settle the difference by an invoice item at Stripe, or void it",
    ),
    "no_subscription_item": Reason(
        "No subscription of the customer has the meter's price.",
        "add the price to a subscription whose period covers the usage and resend it, or void it",
    ),
    "not_a_whole_number": Reason(
        "Usage records take whole numbers from 0, and the hour's sum is not one.",
        "correct the events of that hour and resend it, or void it",
    ),
    "meter_changed": Reason(
        "Another meter with another formula has the name by now, and would bill it as something else.",
        "give the name back to a meter with the old formula and resend it, settle it by an invoice item at Stripe, or"
        " void it",
    ),
    "archived_meter": Reason("The meter was deactivated.", "reactivate the meter at Stripe and resend it, or void it"),
    "no_meter": Reason("Stripe has no meter of this name.", "create the meter at Stripe and resend it, or void it"),
    "meter_event_customer_not_found": Reason(
        "Stripe does not know the customer, or it was deleted.",
        "void it, and link the reference to the right customer for what comes",
    ),
    "meter_event_no_customer_defined": Reason(
        "The meter's customer key was changed after the delivery was made.", "void it, or correct the meter and resend"
    ),
    "meter_event_invalid_value": Reason(
        "The meter's value key was changed after the delivery was made.", "void it, or correct the meter and resend"
    ),
    "meter_event_value_too_many_digits": Reason(
        "Stripe refused the value's length, which should not happen.", "report it, with `explain`"
    ),
    "timestamp_too_far_in_past": Reason("Stripe found the usage too old.", CARRY_OR),
    "timestamp_in_future": Reason("This machine's clock is ahead of Stripe's.", "mend the clock, then resend it"),
}
STRIPES_OWN = Reason("Stripe refused it, with the code and the text given.", "mend the cause and resend it, or void it")


def explain_reason(reason: str | None) -> Reason:
    """What a parked delivery's reason means. Stripe's own codes stand before a colon and Stripe's text."""
    return PARKED.get((reason or "").partition(":")[0], STRIPES_OWN)


async def announce_parked(connection: AsyncConnection, deliveries: Sequence[Mapping[Any, Any]]) -> None:
    """Queue `usage.parked` for deliveries that are being parked in the caller's transaction, given as their rows."""
    await queue_notifications(
        connection,
        [
            Notification(
                "usage.parked",
                delivery["customer"],
                {
                    "identifier": delivery["identifier"],
                    "meter": delivery["event_name"],
                    "timestamp": datetime.fromtimestamp(delivery["timestamp"], UTC).isoformat(),
                    "reason": delivery["reason"],
                },
            )
            for delivery in deliveries
        ],
    )
