"""What the run is about: customers who are billed for usage by the day, and the end of their periods."""

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal

import httpx
from stripe import StripeClient

from tallystick.resources import Resources
from tests.faults.clients import METER

CUSTOMERS = ("acme", "globex", "initech", "umbrella")
BEGAN_AGO = timedelta(hours=12)


@dataclass
class Customer:
    """A billed customer. `invoiced`: by period, what its final invoice says."""

    ref: str
    id: str
    since: datetime
    invoiced: dict[tuple[datetime, datetime], Decimal] = field(default_factory=dict)


@dataclass
class Business:
    """The billed customers, and the price that the others subscribe to."""

    customers: list[Customer]
    seat_price: str
    ends: datetime
    """When the last period that a run can touch is over."""


async def open_business(resources: Resources, control: httpx.AsyncClient, run_seconds: float) -> Business:
    """Meter, prices and customers whose first period ends during the run, each at another moment of it."""
    stripe = resources.stripe
    now = datetime.now(UTC).replace(microsecond=0)
    began = now - BEGAN_AGO
    await control.post("/_fake/settings", json={"upcoming_invoice_days": 0})
    await control.post("/_fake/clock", json={"to": int(began.timestamp())})
    meter = await stripe.v1.billing.meters.create_async(
        {"display_name": "API requests", "event_name": METER, "default_aggregation": {"formula": "sum"}}
    )
    product = await stripe.v1.products.create_async({"name": "API"})
    metered = await stripe.v1.prices.create_async(
        {
            "product": product.id,
            "currency": "eur",
            "unit_amount": 2,
            "recurring": {"interval": "day", "usage_type": "metered", "meter": meter.id},
        }
    )
    seat = await stripe.v1.prices.create_async(
        {"product": product.id, "currency": "eur", "unit_amount": 900, "recurring": {"interval": "month"}}
    )
    customers = []
    for number, ref in enumerate(CUSTOMERS):
        ends = now + timedelta(seconds=run_seconds * (number + 1) / (len(CUSTOMERS) + 1))
        customers.append(await _subscribe(stripe, ref, metered.id, ends))
    await control.post("/_fake/clock", json={"to": int(now.timestamp())})
    return Business(customers, seat.id, now + timedelta(seconds=run_seconds, days=1, minutes=1))


async def _subscribe(stripe: StripeClient, ref: str, price: str, first_period_ends: datetime) -> Customer:
    made = await stripe.v1.customers.create_async({"name": ref.title(), "metadata": {"tallystick_ref": ref}})
    method = await stripe.v1.payment_methods.attach_async("pm_card_visa", {"customer": made.id})
    await stripe.v1.customers.update_async(made.id, {"invoice_settings": {"default_payment_method": method.id}})
    subscription = await stripe.v1.subscriptions.create_async(
        {
            "customer": made.id,
            "items": [{"price": price}],
            "billing_cycle_anchor": int(first_period_ends.timestamp()),
        }
    )
    item = subscription.to_dict(for_json=True)["items"]["data"][0]
    return Customer(ref, made.id, datetime.fromtimestamp(item["current_period_start"], UTC))


async def read_invoices(stripe: StripeClient, business: Business) -> None:
    """Note the quantities of every final invoice, by customer and period."""
    for customer in business.customers:
        invoices = await stripe.v1.invoices.list_async({"customer": customer.id, "limit": 100})
        for invoice in invoices.data:
            for line in invoice.lines.data:
                if invoice.status in ("open", "paid") and line.quantity_decimal is not None:
                    period = (
                        datetime.fromtimestamp(line.period.start, UTC),
                        datetime.fromtimestamp(line.period.end, UTC),
                    )
                    customer.invoiced[period] = customer.invoiced.get(period, Decimal(0)) + line.quantity_decimal
