"""Histories that really happen at the fake Stripe, their events in any arrangement, and what Stripe has at the end."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import httpx
from msgspec.structs import astuple

from tallystick.access.policy import Invoice, Subscription, decide_access
from tallystick.mirror.changes import SubscriptionChange
from tallystick.mirror.marks import STUB
from tallystick.mirror.statements import TABLES
from tallystick.resources import Resources
from tallystick.rules import AccessRules
from tallystick.webhooks.refresh import KINDS
from tallystick.webhooks.translate import SUMMARY, instant, translate_object
from tests.webhooks.stripe_events import NOON, read

REFERENCE_KEY = "tallystick_ref"
HOUR, DAY, FORTNIGHT = 3_600, 86_400, 14 * 86_400
# Told by events alone.
NOT_AT_STRIPE = ("payment_failed_at", "payment_failing_since")


@dataclass
class Business:
    """Some customers at the fake Stripe and what happens to them. What is not possible just then does not happen."""

    control: httpx.AsyncClient
    random: random.Random
    prices: list[str] = field(default_factory=list)
    products: list[str] = field(default_factory=list)
    meters: list[str] = field(default_factory=list)
    customers: list[str] = field(default_factory=list)
    subscriptions: list[str] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)  # all that Stripe told until the last move of the clock

    async def post(self, path: str, **params: object) -> dict[str, Any] | None:
        answer = await self.control.post(
            f"/v1/{path}", data=dict(_flat(params)), headers={"Authorization": "Bearer sk_test_1"}
        )
        assert answer.status_code < 500, answer.text
        return answer.json() if answer.is_success else None

    async def get(self, path: str, **params: object) -> dict[str, Any] | None:
        answer = await self.control.get(
            f"/v1/{path}", params=dict(_flat(params)), headers={"Authorization": "Bearer sk_test_1"}
        )
        return answer.json() if answer.is_success else None

    async def open(self) -> None:
        """An empty account whose clock stands still, a catalogue, and two customers with subscriptions."""
        reset = {"seed": self.random.randrange(10**6), "to": NOON, "frozen": True}
        (await self.control.post("/_fake/reset", json=reset)).raise_for_status()
        meter = await self.post(
            "billing/meters", display_name="Calls", event_name="calls", default_aggregation={"formula": "sum"}
        )
        assert meter is not None
        self.meters.append(meter["id"])
        for name in ("gold", "silver"):
            product = await self.post("products", name=name)
            feature = await self.post("entitlements/features", name=name, lookup_key=name)
            assert product is not None
            assert feature is not None
            await self.post(f"products/{product['id']}/features", entitlement_feature=feature["id"])
            price = await self.post(
                "prices", currency="usd", unit_amount=900, product=product["id"], recurring={"interval": "month"}
            )
            assert price is not None
            self.products.append(product["id"])
            self.prices.append(price["id"])
        for _ in range(2):
            await self.customer_signs_up()

    async def live(self, steps: int, focus: Sequence[str] = ()) -> None:
        """Let things happen, several within a second or days apart.

        In each history some kinds of things happen often: those of `focus`, or some that chance picks.
        """
        kinds = [
            self.customer_signs_up,
            self.customer_subscribes,
            self.customer_checks_out,
            self.customer_is_renamed,
            self.customer_leaves_for_good,
            self.card_changes,
            self.card_is_detached,
            self.items_change,
            self.subscription_is_canceled,
            self.subscription_is_to_end,
            self.collection_is_paused_or_resumed,
            self.invoice_is_settled,
            self.catalogue_changes,
            self.meter_changes,
        ]
        often = [kind for kind in kinds if kind.__name__ in focus] or self.random.sample(kinds, 4)
        for _ in range(steps):
            await self.random.choice([*often, self.time_passes, self.time_passes])()
        # What falls due in the next hour follows from what has happened, such as an invoice that is finalized.
        await self.advance(HOUR + 1)

    async def advance(self, seconds: int) -> None:
        """Move the clock, a fortnight at a time: Stripe lists events for a month only."""
        for start in range(0, seconds, FORTNIGHT):
            await self._collect_events()
            step = {"advance_seconds": min(FORTNIGHT, seconds - start)}
            (await self.control.post("/_fake/clock", json=step)).raise_for_status()
        await self._collect_events()

    async def time_passes(self) -> None:
        await self.advance(self.random.choice((1, 1, 1, HOUR + 5, 4 * DAY, 32 * DAY)))

    async def customer_signs_up(self) -> None:
        card = self._card()
        made = await self.post(
            "customers",
            metadata={REFERENCE_KEY: self._name()},
            payment_method=card,
            invoice_settings={"default_payment_method": card},
        )
        assert made is not None
        self.customers.append(made["id"])
        await self._subscribe(made["id"])

    async def customer_subscribes(self) -> None:
        await self._subscribe(self.random.choice(self.customers))

    async def customer_checks_out(self) -> None:
        session = await self.post(
            "checkout/sessions",
            mode="subscription",
            client_reference_id=self._name(),
            line_items=[{"price": self.random.choice(self.prices), "quantity": 1}],
            **({"customer": self.random.choice(self.customers)} if self.random.random() < 0.5 else {}),
        )
        if session is not None:
            await self.control.post(f"/_fake/checkout_sessions/{session['id']}/complete")

    async def customer_is_renamed(self) -> None:
        await self.post(f"customers/{self.random.choice(self.customers)}", metadata={REFERENCE_KEY: self._name()})

    async def customer_leaves_for_good(self) -> None:
        customer = self.random.choice(self.customers)
        await self.post(f"customers/{customer}", description="leaves")
        await self.control.delete(f"/v1/customers/{customer}", headers={"Authorization": "Bearer sk_test_1"})

    async def card_changes(self) -> None:
        settings = {"default_payment_method": self._card()}
        await self.post(f"customers/{self.random.choice(self.customers)}", invoice_settings=settings)

    async def card_is_detached(self) -> None:
        cards = await self.get("payment_methods", customer=self.random.choice(self.customers))
        if cards is not None and cards["data"]:
            await self.post(f"payment_methods/{self.random.choice(cards['data'])['id']}/detach")

    async def items_change(self) -> None:
        subscription = await self.get(f"subscriptions/{self.random.choice(self.subscriptions)}")
        if subscription is None:
            return
        items = [{"id": item["id"], "deleted": True} for item in subscription["items"]["data"]]
        await self.post(
            f"subscriptions/{subscription['id']}",
            items=[*items, {"price": self.random.choice(self.prices)}],
            proration_behavior="none",
        )

    async def subscription_is_canceled(self) -> None:
        subscription = self.random.choice(self.subscriptions)
        await self.control.delete(f"/v1/subscriptions/{subscription}", headers={"Authorization": "Bearer sk_test_1"})

    async def subscription_is_to_end(self) -> None:
        to_end = self.random.choice(("true", "false"))
        await self.post(f"subscriptions/{self.random.choice(self.subscriptions)}", cancel_at_period_end=to_end)

    async def collection_is_paused_or_resumed(self) -> None:
        pause: object = {"behavior": "void"} if self.random.random() < 0.6 else ""
        await self.post(f"subscriptions/{self.random.choice(self.subscriptions)}", pause_collection=pause)

    async def invoice_is_settled(self) -> None:
        invoices = await self.get("invoices", status="open")
        if invoices is not None and invoices["data"]:
            invoice = self.random.choice(invoices["data"])["id"]
            how = self.random.choice(("pay", "void", "mark_uncollectible"))
            await self.post(f"invoices/{invoice}/{how}", **({"paid_out_of_band": "true"} if how == "pay" else {}))

    async def catalogue_changes(self) -> None:
        number = self.random.randrange(2)
        await self.post(f"prices/{self.prices[number]}", lookup_key=f"key_{self.random.randrange(5)}_{number}")
        await self.post(f"products/{self.products[number]}", active=self.random.choice(("true", "false")))

    async def meter_changes(self) -> None:
        change = self.random.choice(("deactivate", "reactivate"))
        await self.post(f"billing/meters/{self.meters[0]}/{change}")

    async def _collect_events(self) -> None:
        """Add what is new in Stripe's list, which has the newest first."""
        known = {event["id"] for event in self.events}
        new: list[dict[str, Any]] = []
        more = True
        while more:
            after = {"starting_after": new[-1]["id"]} if new else {}
            page = await self.get("events", limit=100, **after)
            assert page is not None
            new += [event for event in page["data"] if event["id"] not in known]
            more = page["has_more"] and page["data"][-1]["id"] not in known
        self.events += new[::-1]

    async def _subscribe(self, customer: str) -> None:
        prices = self.random.sample(self.prices, self.random.choice((1, 1, 2)))
        trial = {"trial_period_days": 3} if self.random.random() < 0.2 else {}
        made = await self.post(
            "subscriptions", customer=customer, items=[{"price": price} for price in prices], **trial
        )
        if made is not None:
            self.subscriptions.append(made["id"])

    def _name(self) -> str:
        return self.random.choice(("acme", "globex", "initech"))

    def _card(self) -> str:
        return self.random.choice(("pm_card_visa", "pm_card_chargeCustomerFail"))


def _flat(params: Mapping[str, object], prefix: str = "") -> list[tuple[str, str]]:
    """Nested parameters as Stripe's forms have them: `items[0][price]`."""
    pairs: list[tuple[str, str]] = []
    for key, value in params.items():
        name = f"{prefix}[{key}]" if prefix else key
        if isinstance(value, Mapping):
            pairs += _flat(value, name)
        elif isinstance(value, list):
            pairs += _flat({str(number): entry for number, entry in enumerate(value)}, name)
        else:
            pairs.append((name, "true" if value is True else str(value)))
    return pairs


def arrange(chance: random.Random, events: Sequence[dict[str, Any]], receivers: int) -> list[list[tuple[int, Any]]]:
    """Deliveries, some of them at once: every event at least once, in any order, at any receiver, at several or again.

    In some arrangements events are only a little late, as Stripe's mostly are; in the others they may be days late.
    """
    lateness = chance.choice((3, len(events), len(events)))
    deliveries = [
        (position + chance.uniform(0, lateness), chance.randrange(receivers), event)
        for position, event in enumerate(events)
        for _ in range(chance.choice((1, 1, 1, 2)))
    ]
    in_order = [(receiver, event) for _, receiver, event in sorted(deliveries, key=lambda delivery: delivery[0])]
    groups = []
    while in_order:
        size = chance.randint(1, 12)
        groups.append(in_order[:size])
        del in_order[:size]
    return groups


# What Stripe holds


async def expected_mirror(business: Business, events: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Every object that events told of, as Stripe has it now: its fields, or `deleted`; by kind and id."""
    expected: dict[str, dict[str, Any]] = {kind: {} for kind in KINDS}
    for event in events:
        payload = event["data"]["object"]
        kind, object_id = payload["object"], payload.get("id")
        if kind in KINDS and kind != SUMMARY and object_id is not None and object_id not in expected[kind]:
            if kind == "checkout.session" and not event["type"].endswith(".completed"):
                continue
            expected[kind][object_id] = await _expected(business, kind, object_id)
    gone = {customer for customer, fields in expected["customer"].items() if fields == "deleted"}
    # Deleting a customer detaches its cards, of which no event tells.
    expected["payment_method"] = {
        id_: fields for id_, fields in expected["payment_method"].items() if not await _had(events, id_, gone)
    }
    for event in events:
        if event["data"]["object"]["object"] == SUMMARY:
            customer = event["data"]["object"]["customer"]
            listed = await business.get("entitlements/active_entitlements", customer=customer, limit=100)
            entries = listed["data"] if listed is not None else []
            expected[SUMMARY][customer] = sorted(entry["lookup_key"] for entry in entries)
    return expected


async def _had(events: Sequence[Mapping[str, Any]], payment_method: str, customers: set[str]) -> bool:
    payloads = (event["data"]["object"] for event in events)
    return any(payload.get("id") == payment_method and payload.get("customer") in customers for payload in payloads)


async def _expected(business: Business, kind: str, object_id: str) -> Any:
    payload = await business.get(f"{KINDS[kind].path.removeprefix('/v1/')}/{object_id}")
    if payload is None or payload.get("deleted"):
        return "deleted"
    change = translate_object(kind, payload, STUB, REFERENCE_KEY).change
    assert change is not None
    fields = {name: getattr(change, name) for name in TABLES[type(change)][1] if name not in NOT_AT_STRIPE}
    if isinstance(change, SubscriptionChange):
        fields["items"] = sorted(astuple(item) for item in change.items)
    return fields


async def mirrored(resources: Resources, expected: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The same objects as the mirror has them."""
    found: dict[str, dict[str, Any]] = {kind: {} for kind in KINDS}
    items: dict[str, list[tuple[Any, ...]]] = {}
    for row in await read(resources, "SELECT * FROM subscription_items WHERE NOT deleted ORDER BY id"):
        item = (row["id"], row["price"], row["current_period_start"], row["current_period_end"])
        items.setdefault(row["subscription"], []).append(item)
    for kind, of in KINDS.items():
        columns = [name for name in TABLES[of.change][1] if name not in NOT_AT_STRIPE]
        for row in await read(resources, f"SELECT * FROM {of.table} WHERE id = ANY(:ids)", ids=list(expected[kind])):  # noqa: S608
            fields: Any = {name: row[name] for name in columns}
            if kind == "subscription":
                fields["items"] = items.get(row["id"], [])
            found[kind][row["id"]] = "deleted" if row["deleted"] else fields
    for customer in expected[SUMMARY]:
        query = "SELECT lookup_key FROM active_entitlements WHERE customer = :customer AND NOT deleted ORDER BY 1"
        found[SUMMARY][customer] = [row["lookup_key"] for row in await read(resources, query, customer=customer)]
    return found


async def expected_access(
    business: Business, events: Sequence[Mapping[str, Any]], expected: Mapping[str, Mapping[str, Any]], now: datetime
) -> dict[str, tuple[str, str, tuple[str, ...]]]:
    """Each customer's access as it follows from what Stripe holds, and from which payments it said had failed."""
    failing: dict[str, datetime] = {}
    for event in events:
        if event["type"] == "invoice.payment_failed":
            at = instant(event["created"])
            assert at is not None
            failing.setdefault(event["data"]["object"]["id"], at)
    access: dict[str, tuple[str, str, tuple[str, ...]]] = {}
    for customer, fields in expected["customer"].items():
        subscriptions = [
            Subscription(
                id_,
                of["status"],
                of["pause_collection"],
                of["latest_invoice"],
                tuple(item[1] for item in of["items"]),
                max((item[2] for item in of["items"]), default=None),
            )
            for id_, of in expected["subscription"].items()
            if of["customer"] == customer
        ]
        invoices = [
            Invoice(
                id_,
                of["subscription"],
                of["status"],
                of["created"],
                failing.get(id_),
                of["due_date"],
                of["finalized_at"],
            )
            for id_, of in expected["invoice"].items()
            if of != "deleted" and of["customer"] == customer
        ]
        decision = decide_access(subscriptions, invoices, AccessRules(), now, customer_deleted=fields == "deleted")
        access[customer] = (decision.access, decision.reason, decision.prices)
    return access
