"""The demo catalogue of the fake Stripe: a metered plan and three customers on it, made with the real SDK."""

from stripe import StripeClient

from tallystick.config import Settings
from tallystick.stripe_gateway import Connections, create_stripe

METER = "api_requests"
CUSTOMERS = ("acme", "globex", "initech")


async def create_plan(stripe: StripeClient) -> str:
    """A meter, a product and a monthly metered price on it; the price's id."""
    meter = await stripe.v1.billing.meters.create_async(
        {"display_name": "API requests", "event_name": METER, "default_aggregation": {"formula": "sum"}}
    )
    product = await stripe.v1.products.create_async({"name": "API"})
    price = await stripe.v1.prices.create_async(
        {
            "product": product.id,
            "currency": "eur",
            "unit_amount": 2,
            "recurring": {"interval": "month", "usage_type": "metered", "meter": meter.id},
        }
    )
    return price.id


async def create_catalogue(settings: Settings) -> None:
    """Make the meter, product, price, customers and subscriptions; nothing when they are there already."""
    connections = Connections(settings.stripe_timeout_seconds)
    try:
        stripe = create_stripe(settings, connections)
        if (await stripe.v1.billing.meters.list_async({"limit": 1})).data:
            return
        price = await create_plan(stripe)
        for name in CUSTOMERS:
            customer = await stripe.v1.customers.create_async(
                {"name": name.title(), "metadata": {settings.customer_reference_key: name}}
            )
            method = await stripe.v1.payment_methods.attach_async("pm_card_visa", {"customer": customer.id})
            await stripe.v1.customers.update_async(
                customer.id, {"invoice_settings": {"default_payment_method": method.id}}
            )
            await stripe.v1.subscriptions.create_async({"customer": customer.id, "items": [{"price": price}]})
    finally:
        await connections.close_async()
