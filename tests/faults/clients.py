"""Who uses the service: products that post usage and retry as good clients do, one that asks for access, and Stripe's
own customers, whose subscriptions come, change and go."""

import asyncio
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from time import monotonic

import httpx
import stripe
from stripe import StripeClient

from tallystick.usage.events import plain

METER = "api_requests"
# A service that does not answer within this is asked again.
ANSWER_SECONDS = 10
LONGEST_PAUSE_SECONDS = 2.0

Key = tuple[str, str]


@dataclass(frozen=True)
class Body:
    """What an event says. `at` is None when it has no timestamp of its own."""

    customer: str
    value: Decimal
    at: datetime | None


@dataclass
class Book:
    """What all clients have sent and were told; the other half of every check."""

    sent: dict[Key, list[Body]] = field(default_factory=dict)
    told: dict[Key, list[Body]] = field(default_factory=dict)
    answers: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    retries: int = 0
    last_taken_from: float = 0.0
    """When the request began that was the last to be accepted, by the monotonic clock."""

    def note_sent(self, key: Key, body: Body) -> None:
        bodies = self.sent.setdefault(key, [])
        if body not in bodies:
            bodies.append(body)

    def note_told(self, key: Key, body: Body) -> None:
        bodies = self.told.setdefault(key, [])
        if body not in bodies:
            bodies.append(body)


@dataclass
class Product:
    """A service of the product: it posts uses, and each batch until it is told what became of every event."""

    source: str
    api: httpx.AsyncClient
    book: Book
    chance: random.Random
    customers: Sequence[str]
    since: datetime
    pause_seconds: float = 0.1
    enough: asyncio.Event = field(default_factory=asyncio.Event)
    made: int = 0
    mine: list[tuple[str, Body]] = field(default_factory=list)

    async def work(self) -> None:
        """Post until there is `enough`; the last batch to its end."""
        while not self.enough.is_set():
            await self.post_until_told(self.make_batch())
            await asyncio.sleep(self.pause_seconds * self.chance.random() * 2)

    def make_batch(self) -> list[tuple[str, Body]]:
        """Up to 20 uses; now and then one that was told already, or an id of mine with another value."""
        batch = [self.make_use() for _ in range(self.chance.randrange(1, 20))]
        if self.mine and self.chance.random() < 0.3:
            batch.append(self.chance.choice(self.mine))
        if self.mine and self.chance.random() < 0.05:
            id, body = self.chance.choice(self.mine)
            batch.append((id, Body(body.customer, body.value + 1, body.at)))
        return batch

    def make_use(self) -> tuple[str, Body]:
        self.made += 1
        at = None
        if self.chance.random() < 0.6:
            back = self.chance.random() * (datetime.now(UTC) - self.since).total_seconds()
            at = (datetime.now(UTC) - timedelta(seconds=back)).replace(microsecond=self.made % 1000 * 1000)
            at = max(at, self.since)
        value = Decimal(self.chance.randrange(1, 10**5)).scaleb(-self.chance.randrange(4))
        use = f"use-{self.made}", Body(self.chance.choice(self.customers), value, at)
        if self.made % 10 == 0:
            self.mine.append(use)
        return use

    async def post_until_told(self, batch: Sequence[tuple[str, Body]]) -> None:
        """The same events with the same ids until there is an answer that says what became of them."""
        uses = [
            {"id": id, "customer": body.customer, "meter": METER, "value": plain(body.value)}
            | ({"timestamp": body.at.isoformat()} if body.at else {})
            for id, body in batch
        ]
        for id, body in batch:
            self.book.note_sent((self.source, id), body)
        pause = 0.05
        while True:
            began = monotonic()
            asked_to_wait = 0.0
            try:
                answer = await self.api.post("/v1/usage", params={"results": "all"}, json=uses)
            except httpx.TransportError as error:
                self.book.answers[type(error).__name__] += 1
            else:
                self.book.answers[str(answer.status_code)] += 1
                if answer.status_code in (202, 422):
                    self._note_results(batch, answer, began)
                    return
                if answer.status_code != 429 and answer.status_code < 500:
                    self.book.wrong.append(f"POST /v1/usage: {answer.status_code} {answer.text[:200]}")
                    return
                asked_to_wait = float(answer.headers.get("Retry-After", "0"))
            self.book.retries += 1
            await asyncio.sleep(max(asked_to_wait, pause) * (1 + self.chance.random() / 4))
            pause = min(pause * 2, LONGEST_PAUSE_SECONDS)

    def _note_results(self, batch: Sequence[tuple[str, Body]], answer: httpx.Response, began: float) -> None:
        for (id, body), result in zip(batch, answer.json()["results"], strict=True):
            if result["result"] in ("accepted", "duplicate"):
                self.book.note_told((self.source, id), body)
                self.book.last_taken_from = max(self.book.last_taken_from, began)
            elif result["result"] != "conflict" or len(self.book.sent[(self.source, id)]) == 1:
                self.book.wrong.append(f"{self.source} {id}: {result}")


@dataclass
class Reader:
    """A service that asks what customers may do. It must get an answer or an honest 503, and never a wrong status."""

    api: httpx.AsyncClient
    book: Book
    customers: Sequence[str]
    enough: asyncio.Event

    async def work(self) -> None:
        turn = 0
        while not self.enough.is_set():
            turn += 1
            try:
                answer = await self.api.get(f"/v1/customers/{self.customers[turn % len(self.customers)]}/access")
                self.book.answers[f"access {answer.status_code}"] += 1
                if answer.status_code not in (200, 429, 503):
                    self.book.wrong.append(f"GET access: {answer.status_code} {answer.text[:200]}")
            except httpx.TransportError as error:
                self.book.answers[f"access {type(error).__name__}"] += 1
            await asyncio.sleep(0.1)


@dataclass
class Subscribers:
    """People at Stripe: they sign up, change their cards, pause, cancel. Each act makes Stripe send webhooks."""

    stripe: StripeClient
    chance: random.Random
    price: str
    enough: asyncio.Event
    pause_seconds: float = 0.3
    customers: list[str] = field(default_factory=list)
    subscriptions: list[str] = field(default_factory=list)
    refused: int = 0

    async def work(self) -> None:
        acts = [self.sign_up, self.sign_up, self.rename, self.pause, self.resume, self.cancel_later, self.cancel]
        while not self.enough.is_set():
            try:
                await self.chance.choice(acts)()
            except stripe.StripeError:
                self.refused += 1  # the act makes no sense now, or Stripe misbehaves; people go on
            await asyncio.sleep(self.pause_seconds * self.chance.random() * 2)

    async def sign_up(self) -> None:
        number = len(self.customers) + 1
        made = await self.stripe.v1.customers.create_async({"metadata": {"tallystick_ref": f"person-{number}"}})
        self.customers.append(made.id)
        card = self.chance.choice(["pm_card_visa", "pm_card_visa", "pm_card_chargeCustomerFail"])
        method = await self.stripe.v1.payment_methods.attach_async(card, {"customer": made.id})
        await self.stripe.v1.customers.update_async(
            made.id, {"invoice_settings": {"default_payment_method": method.id}}
        )
        trial_days = 14 if self.chance.random() < 0.3 else 0
        subscription = await self.stripe.v1.subscriptions.create_async(
            {"customer": made.id, "items": [{"price": self.price}], "trial_period_days": trial_days}
        )
        self.subscriptions.append(subscription.id)

    async def rename(self) -> None:
        if self.customers:
            await self.stripe.v1.customers.update_async(
                self.chance.choice(self.customers), {"metadata": {"seen": str(self.chance.random())}}
            )

    async def pause(self) -> None:
        if self.subscriptions:
            await self.stripe.v1.subscriptions.update_async(
                self.chance.choice(self.subscriptions), {"pause_collection": {"behavior": "void"}}
            )

    async def resume(self) -> None:
        if self.subscriptions:
            await self.stripe.v1.subscriptions.update_async(
                self.chance.choice(self.subscriptions), {"pause_collection": ""}
            )

    async def cancel_later(self) -> None:
        if self.subscriptions:
            await self.stripe.v1.subscriptions.update_async(
                self.chance.choice(self.subscriptions), {"cancel_at_period_end": self.chance.random() < 0.7}
            )

    async def cancel(self) -> None:
        if self.subscriptions and self.chance.random() < 0.5:
            await self.stripe.v1.subscriptions.cancel_async(self.chance.choice(self.subscriptions))
