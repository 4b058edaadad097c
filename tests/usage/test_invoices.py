"""Invariant I3: the invoice's quantity equals what was accepted for its period, to the last digit.

Two months of a few customers, lived on the fake Stripe's clock: the real API and Stripe's webhooks over HTTP, the
worker's loops called whenever the clock has moved. What was accepted is counted here, from the API's answers.

A history is a seed. `INVOICE_HISTORIES=200 pytest tests/usage/test_invoices.py -n auto` lives through more of them.
"""

import asyncio
import dataclasses
import os
import random
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta, tzinfo
from decimal import Decimal
from typing import Any

import httpx
import pytest

from tallystick import db
from tallystick.app import create_app
from tallystick.auth import create_key
from tallystick.resources import Resources
from tallystick.rules import Rules
from tallystick.usage import ingest
from tallystick.usage.delivery import deliver_all
from tallystick.usage.drain import drain
from tallystick.usage.events import plain
from tallystick.usage.meters import refresh_meters
from tallystick.usage.partitions import make_partitions
from tallystick.usage.sealing import answer_seal_requests, seal_due
from tallystick.webhooks.refresh import refresh_mirror
from tests.conftest import WEBHOOK_SECRET, FakeStripe, open_client
from tests.serving import serve
from tests.usage.making import conservation, read_all

HISTORIES = int(os.environ.get("INVOICE_HISTORIES", "1"))

DAY = timedelta(days=1)
HOUR = timedelta(hours=1)
SECOND = timedelta(seconds=1)
MICROSECOND = timedelta(microseconds=1)

# A whole period and more before the present, so that everything that is checked against the real time lies behind it.
BEGUN_AGO = timedelta(days=66)
LASTS = timedelta(days=64)

# What each meter's usage is at Stripe, and here.
FORMULAS = {"calls": "sum", "jobs": "count", "seats": "last", "peak": "last", "users": "last"}
RULES = Rules.model_validate(
    {
        "meters": {
            "peak": {"aggregation": "max"},
            "users": {"aggregation": "unique_count", "property": "user", "properties": ["user"]},
        }
    }
)


@dataclasses.dataclass(frozen=True)
class Use:
    """An event that was accepted."""

    customer: str
    meter: str
    value: Decimal
    at: datetime
    user: str | None


MEANING: dict[str, Callable[[Sequence[Use]], Decimal]] = {
    "calls": lambda uses: max(sum((use.value for use in uses), Decimal(0)), Decimal(0)),
    "jobs": lambda uses: Decimal(len(uses)),
    "seats": lambda uses: max(uses, key=lambda use: use.at).value,
    "peak": lambda uses: max(use.value for use in uses),
    "users": lambda uses: Decimal(len({use.user for use in uses})),
}

FAULTS = ("rate_limit", "error_500", "error_500_after", "timeout_after", "drop_before")


class History:
    """Some customers, what they use, and what goes wrong on the way."""

    def __init__(self, seed: int, resources: Resources, fake: FakeStripe, api: httpx.AsyncClient) -> None:
        self.random = random.Random(seed)
        self.resources, self.fake, self.api = resources, fake, api
        self.now = datetime.now(UTC).replace(microsecond=0) - BEGUN_AGO
        self.customers: dict[str, str] = {}  # reference → Stripe's id
        self.ends: dict[str, datetime] = {}  # reference → when the present period ends
        self.uses: dict[str, Use] = {}  # by id: whatever comes later under one is a repeat
        self.seconds: set[datetime] = set()
        self.posted: list[dict[str, Any]] = []

    async def open(self, webhook_url: str) -> None:
        """An account whose clock stands still at an odd second, its meters, and customers with subscriptions."""
        self.now += timedelta(seconds=self.random.randrange(3600))
        await self.control("reset", seed=self.random.randrange(10**6), to=int(self.now.timestamp()), frozen=True)
        await self.control("webhook_endpoints", url=webhook_url, secret=WEBHOOK_SECRET, enabled_events=["*"])
        await self.control("webhooks", duplicate_probability=0.3)
        prices = [await self.make_price(name, formula) for name, formula in FORMULAS.items()]
        await refresh_meters(self.resources, self.now)
        for number in range(2):
            await self.move(self.now + timedelta(seconds=self.random.randrange(1, 100_000)))
            await self.sign_up(f"customer-{number}", prices)
        for kind in FAULTS:
            await self.control(
                "faults", kind=kind, method="POST", path="/v1/billing/meter_events", probability="0.06", seconds=0
            )

    async def make_price(self, name: str, formula: str) -> str:
        stripe = self.fake.client.v1
        meter = await stripe.billing.meters.create_async(
            {"display_name": name, "event_name": name, "default_aggregation": {"formula": formula}}
        )
        product = await stripe.products.create_async({"name": name})
        recurring: Any = {"interval": "month", "usage_type": "metered", "meter": meter.id}
        price = await stripe.prices.create_async(
            {"product": product.id, "currency": "eur", "unit_amount": 2, "recurring": recurring}
        )
        return price.id

    async def sign_up(self, ref: str, prices: Sequence[str]) -> None:
        stripe = self.fake.client.v1
        metadata = {self.resources.settings.customer_reference_key: ref}
        customer = await stripe.customers.create_async({"metadata": metadata})
        card = await stripe.payment_methods.attach_async("pm_card_visa", {"customer": customer.id})
        await stripe.customers.update_async(customer.id, {"invoice_settings": {"default_payment_method": card.id}})
        await stripe.subscriptions.create_async(
            {"customer": customer.id, "items": [{"price": price} for price in prices]}
        )
        self.customers[ref] = customer.id
        await self.control("settle", timeout_seconds=20)
        await self.work()
        await self.learn_ends()

    async def learn_ends(self) -> None:
        for ref, customer in self.customers.items():
            listed = await self.fake.client.v1.subscriptions.list_async({"customer": customer})
            (subscription,) = listed.to_dict(for_json=True)["data"]
            self.ends[ref] = datetime.fromtimestamp(subscription["items"]["data"][0]["current_period_end"], UTC)

    async def live(self) -> None:
        """From one day to another; each period's end is lived through second by second, and its draft to the end."""
        end = self.now + LASTS
        while self.now < end:
            ref, next_end = min(self.ends.items(), key=lambda each: each[1])
            to = self.now + timedelta(seconds=self.random.randrange(3600, 6 * 86_400))
            if to < next_end - HOUR:
                await self.move(to)
                await self.use_some(6)
            else:
                await self.close_period(ref, next_end)
            await self.work()

    async def close_period(self, ref: str, end: datetime) -> None:
        await self.move(end - timedelta(minutes=1))
        await self.post([self.make_event(ref, at) for at in (end - SECOND, end - MICROSECOND, end)])
        if self.random.random() < 0.5:
            await self.work()
        await self.move(end + timedelta(seconds=self.random.randrange(600)))
        await self.post([self.make_event(ref, at) for at in (end - 2 * SECOND, end + SECOND, end - 30 * HOUR)])
        await self.post([self.make_event(ref, None)])
        # The invoice is a draft for an hour from now on.
        await self.work()
        await self.move(end + timedelta(minutes=35))
        await self.post([self.make_event(ref, end - self.random.randrange(3 * 86_400) * SECOND - MICROSECOND)])
        await self.work()
        await self.learn_ends()
        await self.move(end + timedelta(hours=2))

    async def use_some(self, number: int) -> None:
        events = []
        for _ in range(number):
            ref = self.random.choice(sorted(self.customers))
            behind = timedelta(microseconds=self.random.randrange(int(3 * 86_400e6)))
            # Usage of a period whose invoice is final is on no invoice: it is not what this is about.
            begun = self.ends[ref] - timedelta(days=27)
            at = self.now - behind
            events.append(self.make_event(ref, at if at > begun else None))
        await self.post(events)

    def make_event(self, ref: str, at: datetime | None) -> dict[str, Any]:
        meter = self.random.choice(list(FORMULAS))
        event: dict[str, Any] = {
            "id": f"use-{len(self.posted)}-{self.random.randrange(10**9)}",
            "customer": self.random.choice((ref, self.customers[ref])),
            "meter": meter,
        }
        # Stripe knows a `last` meter's order by the second only.
        if at is not None and (meter != "seats" or at.replace(microsecond=0) not in self.seconds):
            self.seconds.add(at.replace(microsecond=0))
            event["timestamp"] = at.isoformat()
        elif meter == "seats":
            event["meter"] = "calls"
        if event["meter"] != "jobs":
            whole = (
                self.random.randrange(-(10**3), 10**6) if event["meter"] == "calls" else self.random.randrange(10**6)
            )
            event["value"] = plain(Decimal(whole).scaleb(-self.random.randrange(9)))
        if event["meter"] == "users":
            event["properties"] = {"user": f"user-{self.random.randrange(5)}"}
        return event

    async def post(self, events: list[dict[str, Any]]) -> None:
        """Post events, some twice, some again with another body; count those that were accepted."""
        bodies = [*events]
        for event in events:
            if self.random.random() < 0.2:
                bodies.append(event)
            if self.random.random() < 0.15 and event["meter"] != "jobs":
                bodies.append(event | {"value": "77777"})
        # Days later, when Redis has forgotten the id, and within those for which usage is taken.
        if self.posted and self.random.random() < 0.5:
            bodies.append(self.random.choice(self.posted[-40:]))
        self.posted += events
        answer = await self.api.post("/v1/usage", params={"results": "all"}, json=bodies)
        assert answer.status_code in (202, 422), answer.text
        for body, result in zip(bodies, answer.json()["results"], strict=True):
            assert result["result"] != "rejected", result
            if result["result"] == "accepted" and body["id"] not in self.uses:
                self.count(body)

    def count(self, body: dict[str, Any]) -> None:
        names = {**self.customers, **{id: id for id in self.customers.values()}}
        at = datetime.fromisoformat(body["timestamp"]) if "timestamp" in body else self.now
        user = body.get("properties", {}).get("user")
        value = Decimal(body.get("value", "1"))
        self.uses[body["id"]] = Use(names[body["customer"]], body["meter"], value, at, user)

    async def move(self, to: datetime) -> None:
        """Move the clock and let Stripe's webhooks arrive."""
        if to > self.now:
            await self.control("clock", to=int(to.timestamp()))
            await self.control("settle", timeout_seconds=20)
            self.now = to.replace(microsecond=0)
            async with db.transaction(self.resources.engine) as connection:
                await make_partitions(connection, self.now)

    async def work(self) -> None:
        """What the worker does within a few minutes: everything that is due, and again what has failed."""
        moment = self.now
        await refresh_mirror(self.resources, moment)
        await drain(self.resources, moment)
        await answer_seal_requests(self.resources, moment)
        await seal_due(self.resources, moment)
        while True:
            ((due,),) = await read_all(
                self.resources, "SELECT max(next_attempt_at) FROM usage_deliveries WHERE state = 'pending'"
            )
            if due is None:
                return
            assert isinstance(due, datetime)
            # What has failed is tried again minutes later.
            moment = max(moment, due)
            await deliver_all(self.resources, moment)

    async def control(self, path: str, /, **body: object) -> None:
        (await self.fake.control.post(f"/_fake/{path}", json=body)).raise_for_status()

    async def invoiced(self) -> dict[tuple[str, str, datetime, datetime], Decimal]:
        """What Stripe billed: by customer, meter and period."""
        stripe = self.fake.client.v1
        names = {
            meter.id: meter.event_name async for meter in (await stripe.billing.meters.list_async()).auto_paging_iter()
        }
        meters = {}
        async for price in (await stripe.prices.list_async()).auto_paging_iter():
            assert price.recurring is not None
            meters[price.id] = names[str(price.recurring.meter)]
        billed = {}
        for customer in self.customers.values():
            for invoice in (await stripe.invoices.list_async({"customer": customer, "limit": 100})).data:
                if invoice.billing_reason != "subscription_cycle" or invoice.status == "draft":
                    continue
                for line in invoice.to_dict(for_json=True)["lines"]["data"]:
                    start, end = (datetime.fromtimestamp(line["period"][name], UTC) for name in ("start", "end"))
                    meter = meters[line["pricing"]["price_details"]["price"]]
                    billed[customer, meter, start, end] = Decimal(line["quantity_decimal"])
        return billed

    def accepted(self, customer: str, meter: str, start: datetime, end: datetime) -> Decimal:
        """What should have been billed."""
        uses = [
            use
            for use in self.uses.values()
            if use.customer == customer and use.meter == meter and start <= use.at < end
        ]
        return MEANING[meter](uses) if uses else Decimal(0)


@asynccontextmanager
async def open_history(
    seed: int, resources: Resources, fake: FakeStripe, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[History]:
    """The API on a port of its own, at Stripe's time."""
    settings = resources.settings.model_copy(update={"stripe_calls_per_second": 10_000})
    resources = dataclasses.replace(resources, settings=settings)
    app = create_app(settings)
    async with serve(app) as url:
        app.state.resources.rules.rules = resources.rules.rules = RULES
        async with db.transaction(resources.engine) as connection:
            key = await create_key(connection, name="history", source="history", scopes=["usage:write"])
        async with open_client(app, key) as api:
            history = History(seed, resources, fake, api)

            class StripesTime(datetime):
                @classmethod
                def now(cls, tz: tzinfo | None = None) -> Any:
                    return history.now.astimezone(tz)

            monkeypatch.setattr(ingest, "datetime", StripesTime)
            await history.open(f"{url}/webhooks/stripe")
            yield history
        await asyncio.sleep(0)


@pytest.mark.parametrize("seed", range(HISTORIES))
async def test_the_invoice_is_what_was_accepted_to_the_last_digit(
    resources: Resources, fake_stripe: FakeStripe, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    async with open_history(seed, resources, fake_stripe, monkeypatch) as history:
        await history.live()
        billed = await history.invoiced()
        expected = {each: history.accepted(*each) for each in billed}
        assert billed == expected
        assert len({start for _, _, start, _ in billed}) >= 4, "two customers, two periods each"
        by_meter: dict[str, Decimal] = defaultdict(Decimal)
        for (_, meter, _, _), quantity in billed.items():
            by_meter[meter] += quantity
        assert all(by_meter[meter] for meter in FORMULAS), by_meter
        counted = await conservation(resources)
        assert counted.events == len(history.uses)
        assert counted.events_by_state["parked"] == 0
