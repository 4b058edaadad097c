"""A small business at the fake Stripe, the webhooks that tell of it, and what the mirror then holds."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import httpx
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from tallystick.app import create_app
from tallystick.resources import Resources, open_resources
from tallystick.webhooks.drift import Checked, check_mirror
from tallystick.webhooks.refresh import refresh_mirror
from tests.conftest import WEBHOOK_SECRET, FakeStripe
from tests.serving import serve
from tests.webhooks.stripe_events import read


@dataclass
class Shop:
    """Its catalogue, and calls as the shop makes them."""

    stripe: FakeStripe
    product: str
    price: str

    async def sign_up(self, name: str, card: str = "pm_card_visa") -> tuple[str, str]:
        """A customer whom the product calls `name`, and a subscription; their ids."""
        services = self.stripe.client.v1
        customer = await services.customers.create_async(
            {
                "name": name,
                "metadata": {"tallystick_ref": name},
                "payment_method": card,
                "invoice_settings": {"default_payment_method": card},
            }
        )
        subscription = await services.subscriptions.create_async(
            {"customer": customer.id, "items": [{"price": self.price}]}
        )
        return customer.id, subscription.id

    async def cancel(self, subscription: str) -> None:
        await self.stripe.client.v1.subscriptions.cancel_async(subscription)

    async def control(self, what: str, **body: Any) -> Any:
        """The fake Stripe's control API."""
        return (await self.stripe.control.post(f"/_fake/{what}", json=body)).raise_for_status().json()

    async def events(self) -> list[dict[str, Any]]:
        """All events of the list, newest first."""
        page = await self.stripe.client.v1.events.list_async({"limit": 100})
        return [event.to_dict(for_json=True) async for event in page.auto_paging_iter()]

    async def settle(self) -> None:
        """Wait until every webhook has been accepted."""
        await self.control("settle", timeout_seconds=20)


async def open_shop(stripe: FakeStripe) -> Shop:
    services = stripe.client.v1
    product = await services.products.create_async({"name": "Gold"})
    price = await services.prices.create_async(
        {"currency": "usd", "unit_amount": 900, "product": product.id, "recurring": {"interval": "week"}}
    )
    return Shop(stripe, product.id, price.id)


@asynccontextmanager
async def receiving(shop: Shop, resources: Resources) -> AsyncIterator[httpx.AsyncClient]:
    """The application behind a socket, with the shop's webhooks going to it from now on."""
    async with serve(create_app(resources.settings)) as url:
        await shop.control("webhook_endpoints", url=f"{url}/webhooks/stripe", secret=WEBHOOK_SECRET)
        async with httpx.AsyncClient(base_url=url, timeout=20) as client:
            yield client


@asynccontextmanager
async def between_answer_and_use(
    shop: Shop, resources: Resources, path: str, act: Callable[[], Awaitable[None]], *, time: int = 1
) -> AsyncIterator[Resources]:
    """Resources whose Stripe is behind a proxy: when it has answered at `path` for the given time, `act` happens, and
    only then its answer comes."""
    asked = 0

    async def forward(request: Request) -> Response:
        nonlocal asked
        answer = await stripe.request(
            request.method,
            request.url.path,
            params=str(request.query_params),
            content=await request.body(),
            headers={"Authorization": request.headers["authorization"]},
        )
        asked += request.url.path == path
        if request.url.path == path and asked == time:
            await act()
        return Response(answer.content, answer.status_code, media_type="application/json")

    routes = [Route("/{path:path}", forward, methods=["GET", "POST"])]
    async with (
        httpx.AsyncClient(base_url=shop.stripe.url, timeout=20) as stripe,
        serve(Starlette(routes=routes)) as url,
        open_resources(resources.settings.model_copy(update={"stripe_api_base": url}), application_name="t") as opened,
    ):
        yield opened
    assert asked >= time


async def check(resources: Resources, **options: Any) -> Checked:
    """Compare the whole mirror with Stripe."""
    return await check_mirror(resources, datetime.now(UTC), **({"all_invoices": True} | options))


async def differing(resources: Resources) -> list[tuple[str, str, str]]:
    """Kind, id and field of all that differs."""
    checked = await check(resources)
    return [(drift.kind, drift.id, one.field) for drift in checked.drift for one in drift.differences]


async def access_of(resources: Resources, name: str) -> tuple[str, str] | None:
    """The access and the reason of the customer whom the product calls `name`."""
    rows = await read(
        resources,
        "SELECT access, reason FROM customer_access JOIN customer_references USING (customer) WHERE ref = :name",
        name=name,
    )
    return (rows[0]["access"], rows[0]["reason"]) if rows else None


async def refresh_all(resources: Resources) -> None:
    """Fetch what events of one second left in doubt, as the worker does."""
    while await refresh_mirror(resources, datetime.now(UTC)):
        continue
