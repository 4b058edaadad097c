"""Stripe's events as they arrive: distinct, signed, of 4 kB, half of them about subscriptions."""

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from itertools import count
from time import time
from typing import Any

import stripe

from benchmarks.load import make_request
from tallystick.stripe_gateway import API_VERSION

BODY_BYTES = 4_096
MONTH_SECONDS = 30 * 86_400


class StripeEvents:
    """The events of one run, about so many customers. `latest`: whose mark each object must show in the end."""

    def __init__(self, run: str, secret: str, customers: int) -> None:
        self.run = run
        self.customers = customers
        self.latest: dict[str, dict[str, str]] = {"customers": {}, "subscriptions": {}, "invoices": {}}
        self.made = 0
        self._secret = secret
        self._numbers = count()
        # Each event has a second of its own, so that the last of an object's events is known.
        self._start = int(datetime(2025, 1, 1, tzinfo=UTC).timestamp())

    def make(self, requests: int) -> list[bytes]:
        """So many requests with an event each."""
        return [self.sign(self.make_body()) for _ in range(requests)]

    def sign(self, body: str) -> bytes:
        """The request that brings this body, signed now."""
        signature = stripe.WebhookSignature.generate_signature_header(body, self._secret, timestamp=int(time()))
        headers = {"Stripe-Signature": signature, "Content-Type": "application/json"}
        return make_request("POST", "/webhooks/stripe", body.encode(), headers)

    def make_body(self) -> str:
        """The next event: of a subscription, an invoice, a subscription, a customer, and so on."""
        number = next(self._numbers)
        self.made += 1
        place = number % self.customers
        # One turn after the other for the four kinds, so that each customer gets all of them in time.
        kind = (number + number // self.customers) % 4
        created = self._start + number
        if kind == 1:
            return self._write(number, "invoice.paid", "invoices", self._invoice(place, created))
        if kind == 3:
            return self._write(number, "customer.updated", "customers", self._customer(place))
        subscription = self._subscription(number, place)
        return self._write(number, "customer.subscription.updated", "subscriptions", subscription)

    def _write(self, number: int, type_: str, table: str, payload: Mapping[str, Any]) -> str:
        event_id = f"evt_{self.run}_{number:09}"
        self.latest[table][str(payload["id"])] = event_id
        event = {
            "id": event_id,
            "object": "event",
            "api_version": API_VERSION,
            "created": self._start + number,
            "livemode": False,
            "type": type_,
            "data": {"object": payload},
        }
        short = json.dumps(event)
        # Stripe's payloads have many fields that nobody mirrors; one long one costs the parser less, but little.
        event["request"] = {"id": None, "idempotency_key": "x" * (BODY_BYTES - len(short) - 50)}
        return json.dumps(event)

    def _customer(self, place: int) -> dict[str, Any]:
        return {
            "id": f"cus_{self.run}{place}",
            "object": "customer",
            "delinquent": False,
            "invoice_settings": {"default_payment_method": None},
            "metadata": {"tallystick_ref": f"{self.run}-{place}"},
        }

    def _subscription(self, number: int, place: int) -> dict[str, Any]:
        return {
            "id": f"sub_{self.run}{place}",
            "object": "subscription",
            "customer": f"cus_{self.run}{place}",
            # Every eighth time round it is past due, so that access really changes now and then.
            "status": "past_due" if number // self.customers % 8 == 7 else "active",
            "cancel_at_period_end": False,
            "collection_method": "charge_automatically",
            "items": {
                "object": "list",
                "has_more": False,
                "data": [
                    {
                        "id": f"si_{self.run}{place}",
                        "object": "subscription_item",
                        "current_period_start": self._start,
                        "current_period_end": self._start + MONTH_SECONDS,
                        "price": {
                            "id": f"price_{self.run}",
                            "object": "price",
                            "active": True,
                            "lookup_key": None,
                            "product": f"prod_{self.run}",
                            "recurring": {"interval": "month", "meter": None, "usage_type": "licensed"},
                            "type": "recurring",
                        },
                    }
                ],
            },
            "latest_invoice": f"in_{self.run}{place}",
            "pause_collection": None,
            "start_date": self._start,
        }

    def _invoice(self, place: int, created: int) -> dict[str, Any]:
        return {
            "id": f"in_{self.run}{place}",
            "object": "invoice",
            "attempted": True,
            "billing_reason": "subscription_cycle",
            "created": self._start,
            "customer": f"cus_{self.run}{place}",
            "parent": {
                "type": "subscription_details",
                "subscription_details": {"subscription": f"sub_{self.run}{place}"},
            },
            "period_start": self._start - MONTH_SECONDS,
            "period_end": self._start,
            "status": "paid",
            "status_transitions": {"finalized_at": created},
        }
