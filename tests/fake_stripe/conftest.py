"""A fake Stripe on a port of its own for each test, the SDK that talks to it, and a receiver for its webhooks."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
import stripe
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from tallystick.dev.fake_stripe.app import create_fake_stripe

SECRET = "whsec_test"
# A month's last day, at an odd second.
START = int(datetime(2026, 1, 31, 9, 15, 7, tzinfo=UTC).timestamp())
DAY = 86_400
WAIT_SECONDS = 10
RETRY_SECONDS = (0.02, 0.05, 0.1)


class _Server(uvicorn.Server):
    def __init__(self, app: Starlette) -> None:
        super().__init__(uvicorn.Config(app, log_level="error", access_log=False, timeout_graceful_shutdown=1))
        self.ready = threading.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.ready.set()


@contextmanager
def serving(app: Starlette) -> Iterator[str]:
    """Runs an ASGI application on a free port of 127.0.0.1; gives its URL."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = _Server(app)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        assert server.ready.wait(WAIT_SECONDS)
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


@dataclass
class Receiver:
    """Takes webhooks in. `answers` are the statuses of the next answers; then 200."""

    url: str = ""
    answers: list[int] = field(default_factory=list)
    always: int = 200
    got: list[dict[str, Any]] = field(default_factory=list)
    _arrived: threading.Condition = field(default_factory=threading.Condition)

    async def receive(self, request: Request) -> Response:
        body = await request.body()
        header = request.headers["stripe-signature"]
        stripe.WebhookSignature.verify_header(body, header, SECRET, 300)
        with self._arrived:
            status = self.answers.pop(0) if self.answers else self.always
            self.got.append({"event": json.loads(body), "body": body, "header": header, "status": status})
            self._arrived.notify_all()
        return Response(status_code=status)

    def wait_for(self, *types: str, accepted: bool = True) -> list[dict[str, Any]]:
        """Waits until an event of each type has arrived; gives all that arrived."""

        def complete() -> bool:
            arrived = {entry["event"]["type"] for entry in self.got if not accepted or entry["status"] < 300}
            return set(types) <= arrived

        with self._arrived:
            assert self._arrived.wait_for(complete, WAIT_SECONDS), f"of {types} came only {self.types()}"
            return list(self.got)

    def wait_until(self, count: int) -> None:
        """Waits until so many have arrived."""
        with self._arrived:
            assert self._arrived.wait_for(lambda: len(self.got) >= count, WAIT_SECONDS), self.types()

    def types(self) -> list[str]:
        return [entry["event"]["type"] for entry in self.got]

    def events(self, event_type: str) -> list[dict[str, Any]]:
        return [entry["event"] for entry in self.got if entry["event"]["type"] == event_type]


class Fake:
    """The SDK's client and the control API of one fake Stripe."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._http_clients: list[Any] = []
        self.client = self.sdk()
        self.control = httpx.Client(base_url=url, timeout=30, trust_env=False)

    def sdk(self, key: str = "sk_test_1", retries: int = 0, seconds: float = 20) -> stripe.StripeClient:
        http_client = stripe.HTTPXClient(timeout=seconds, allow_sync_methods=True)
        self._http_clients.append(http_client)
        addresses: Any = {"api": self.url, "meter_events": self.url}
        return stripe.StripeClient(key, base_addresses=addresses, max_network_retries=retries, http_client=http_client)

    def close(self) -> None:
        self.control.close()
        for http_client in self._http_clients:
            http_client.close()

    def post(self, path: str, body: dict[str, Any] | None = None, status: int = 200) -> Any:
        answer = self.control.post(f"/_fake/{path}", json=body or {})
        assert answer.status_code == status, answer.text
        return answer.json()

    def get(self, path: str) -> Any:
        return self.control.get(f"/_fake/{path}").raise_for_status().json()

    def raw(self, method: str, path: str, body: dict[str, str] | None = None, **headers: str) -> httpx.Response:
        headers = {"Authorization": "Bearer sk_test_1", **{name.replace("_", "-"): v for name, v in headers.items()}}
        return self.control.request(method, path, data=body, headers=headers)

    def now(self) -> int:
        return int(self.get("clock")["now"])

    def move(self, to: int, settle_seconds: int = 10) -> list[dict[str, Any]]:
        performed: list[dict[str, Any]] = self.post("clock", {"to": to, "settle_seconds": settle_seconds})["performed"]
        return performed

    def listen(self, receiver: Receiver, *events: str, **more: Any) -> None:
        body = {"url": receiver.url, "secret": SECRET, "enabled_events": list(events) or ["*"], **more}
        self.post("webhook_endpoints", body)

    def customer(self, card: str | None = "pm_card_visa") -> str:
        params: Any = {"name": "Acme"}
        if card is not None:
            params |= {"payment_method": card, "invoice_settings": {"default_payment_method": card}}
        return self.client.v1.customers.create(params).id

    def meter(self, event_name: str = "calls", formula: str = "sum", **more: Any) -> str:
        params: Any = {
            "display_name": event_name,
            "event_name": event_name,
            "default_aggregation": {"formula": formula},
        }
        return self.client.v1.billing.meters.create(params | more).id

    def price(self, meter: str | None = None, amount: str = "100", interval: str = "month") -> str:
        product = self.client.v1.products.create({"name": "Plan"}).id
        recurring: Any = {"interval": interval}
        if meter is not None:
            recurring |= {"meter": meter, "usage_type": "metered"}
        params: Any = {"currency": "usd", "product": product, "unit_amount_decimal": amount, "recurring": recurring}
        return self.client.v1.prices.create(params).id

    def subscribe(self, customer: str, *prices: str, **more: Any) -> Any:
        params: Any = {"customer": customer, "items": [{"price": price} for price in prices], **more}
        return self.client.v1.subscriptions.create(params)

    def use(self, customer: str, value: str, identifier: str | None = None, at: int | None = None) -> Any:
        params: Any = {"event_name": "calls", "payload": {"stripe_customer_id": customer, "value": value}}
        if identifier is not None:
            params["identifier"] = identifier
        if at is not None:
            params["timestamp"] = at
        return self.client.v1.billing.meter_events.create(params)

    def invoices(self, customer: str) -> list[Any]:
        """Newest first."""
        return self.client.v1.invoices.list({"customer": customer}).data

    def status(self, subscription: str) -> str:
        return self.client.v1.subscriptions.retrieve(subscription).status

    def event_types(self) -> list[str]:
        """Oldest first."""
        return [event.type for event in reversed(self.client.v1.events.list({"limit": 100}).data)]


Running = Callable[..., Any]


@pytest.fixture
def run_fake() -> Callable[..., Any]:
    """Runs a fake Stripe for the length of a `with` block."""

    @contextmanager
    def run(state_path: Path | None = None, seed: int = 0) -> Iterator[Fake]:
        app = create_fake_stripe(state_path, seed, RETRY_SECONDS)
        with serving(app) as url, closing(Fake(url)) as fake:
            yield fake

    return run


@pytest.fixture
def fake(run_fake: Running) -> Iterator[Fake]:
    """A fake Stripe whose clock stands at START."""
    with run_fake() as running:
        running.post("reset", {"to": START, "frozen": True})
        yield running


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    received = Receiver()
    app = Starlette(routes=[Route("/hook", received.receive, methods=["POST"])])
    with serving(app) as url:
        received.url = f"{url}/hook"
        yield received
