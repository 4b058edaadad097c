"""Events as Stripe sends them, made by hand, and the ways to send them."""

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from itertools import count
from typing import Any

import httpx
import stripe
from sqlalchemy import text

from tallystick import db
from tallystick.resources import Resources
from tallystick.webhooks.verification import StripeEvent, find_endpoint, read_event
from tests.conftest import WEBHOOK_SECRET

NOON = 1_760_000_000  # a whole second in 2025; all events of the tests lie around it
_numbers = count(1)


def event(
    type_: str, payload: Mapping[str, Any], *, at: int = 0, id_: str | None = None, **changed: Any
) -> dict[str, Any]:
    """An event about an object, created `at` seconds after noon."""
    return {
        "id": id_ or f"evt_{next(_numbers):06}",
        "object": "event",
        "api_version": "2026-10-28.endive",
        "created": NOON + at,
        "livemode": False,
        "type": type_,
        "data": {"object": payload},
    } | changed


def customer(id_: str = "cus_1", **changed: Any) -> dict[str, Any]:
    return {
        "id": id_,
        "object": "customer",
        "delinquent": False,
        "invoice_settings": {"default_payment_method": None},
        "metadata": {},
    } | changed


def price(id_: str = "price_1", **changed: Any) -> dict[str, Any]:
    return {
        "id": id_,
        "object": "price",
        "active": True,
        "lookup_key": None,
        "product": "prod_1",
        "recurring": {"interval": "month", "meter": "mtr_1", "usage_type": "metered"},
        "type": "recurring",
    } | changed


def item(id_: str = "si_1", price_id: str = "price_1", start: int = 0, end: int = 2_592_000) -> dict[str, Any]:
    return {
        "id": id_,
        "object": "subscription_item",
        "current_period_start": NOON + start,
        "current_period_end": NOON + end,
        "price": price(price_id),
    }


def subscription(id_: str = "sub_1", status: str = "active", *, items: Any = None, **changed: Any) -> dict[str, Any]:
    return {
        "id": id_,
        "object": "subscription",
        "customer": "cus_1",
        "status": status,
        "cancel_at_period_end": False,
        "collection_method": "charge_automatically",
        "items": {"object": "list", "data": [item()] if items is None else items, "has_more": False},
        "latest_invoice": None,
        "pause_collection": None,
        "start_date": NOON,
    } | changed


def invoice(id_: str = "in_1", status: str = "open", *, of: str | None = "sub_1", **changed: Any) -> dict[str, Any]:
    parent = {"type": "subscription_details", "subscription_details": {"subscription": of}} if of else None
    return {
        "id": id_,
        "object": "invoice",
        "attempted": True,
        "billing_reason": "subscription_cycle" if of else "manual",
        "created": NOON,
        "customer": "cus_1",
        "parent": parent,
        "period_start": NOON - 2_592_000,
        "period_end": NOON,
        "status": status,
        "status_transitions": {"finalized_at": None},
    } | changed


def payment_method(id_: str = "pm_1", **changed: Any) -> dict[str, Any]:
    return {
        "id": id_,
        "object": "payment_method",
        "customer": "cus_1",
        "type": "card",
        "card": {"last4": "4242"},
    } | changed


def checkout_session(id_: str = "cs_1", **changed: Any) -> dict[str, Any]:
    return {
        "id": id_,
        "object": "checkout.session",
        "client_reference_id": "acme",
        "customer": "cus_1",
        "mode": "subscription",
        "status": "complete",
    } | changed


def entitlement(lookup_key: str) -> dict[str, Any]:
    return {
        "id": f"ent_{lookup_key}",
        "object": "entitlements.active_entitlement",
        "feature": f"feat_{lookup_key}",
        "lookup_key": lookup_key,
    }


def entitlement_summary(
    lookup_keys: Sequence[str], customer: str = "cus_1", *, has_more: bool = False
) -> dict[str, Any]:
    """A customer's entitlements as Stripe shows them: without an id, and ten at most."""
    return {
        "object": "entitlements.active_entitlement_summary",
        "customer": customer,
        "entitlements": {"object": "list", "data": [entitlement(key) for key in lookup_keys], "has_more": has_more},
    }


def meter(id_: str = "mtr_1", **changed: Any) -> dict[str, Any]:
    return {
        "id": id_,
        "object": "billing.meter",
        "customer_mapping": {"event_payload_key": "stripe_customer_id", "type": "by_id"},
        "default_aggregation": {"formula": "sum"},
        "event_name": "calls",
        "event_time_window": None,
        "status": "active",
        "value_settings": {"event_payload_key": "value"},
    } | changed


def sign(body: str, *, secret: str = WEBHOOK_SECRET, at: int | None = None) -> dict[str, str]:
    """The header that Stripe would send with this body."""
    return {"Stripe-Signature": stripe.WebhookSignature.generate_signature_header(body, secret, at)}


def verified(resources: Resources, sent: object) -> StripeEvent:
    """What the application makes of a signed body, before it is recorded."""
    body, now = json.dumps(sent), datetime.now(UTC)
    endpoint = find_endpoint(resources, None, now)
    return read_event(body.encode(), sign(body)["Stripe-Signature"], endpoint, 300, now)


async def post(
    client: httpx.AsyncClient, sent: object, path: str = "/webhooks/stripe", *, secret: str = WEBHOOK_SECRET
) -> httpx.Response:
    """Send a signed body to the application."""
    body = json.dumps(sent)
    return await client.post(path, content=body, headers=sign(body, secret=secret))


async def deliver(client: httpx.AsyncClient, *events: Mapping[str, Any]) -> list[str]:
    """Send events one after the other; the verdict of each."""
    verdicts = []
    for sent in events:
        answer = await post(client, sent)
        assert answer.status_code == 200, answer.text
        verdicts.append(answer.json()["verdict"])
    return verdicts


async def read(resources: Resources, query: str, **parameters: object) -> list[dict[str, Any]]:
    """Rows of the database as dictionaries."""
    async with db.transaction(resources.engine) as connection:
        return [dict(row) for row in (await connection.execute(text(query), parameters)).mappings()]


async def let_an_hour_pass(resources: Resources) -> None:
    """As if each failure of our own had been counted an hour earlier."""
    async with db.transaction(resources.engine) as connection:
        await connection.execute(text("UPDATE stripe_event_failures SET last_at = last_at - interval '1 hour'"))


async def read_access(client: httpx.AsyncClient, ref: str = "cus_1") -> tuple[str, str, list[str]]:
    """What the application says of a customer: access, reason, prices."""
    answer = await client.get(f"/v1/customers/{ref}/access")
    assert answer.status_code == 200, answer.text
    body = answer.json()
    return body["access"], body["reason"], body["prices"]
