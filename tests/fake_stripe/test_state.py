"""What survives a restart, what a seed decides, and how the clock runs."""

from __future__ import annotations

import json
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from datetime import UTC, datetime
from decimal import Decimal
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from tallystick.dev.fake_stripe.app import create_fake_stripe
from tallystick.dev.fake_stripe.parameters import check, parse_form, shape_of
from tallystick.dev.fake_stripe.periods import boundary, next_boundary
from tests.fake_stripe.conftest import START, Fake, Receiver, serving

FIRST_END = int(datetime(2026, 2, 28, 9, 15, 7, tzinfo=UTC).timestamp())


def test_everything_survives_a_restart(run_fake: Callable[..., Any], receiver: Receiver, tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "state.db"
    with run_fake(path) as fake:
        fake.post("reset", {"to": START, "frozen": True})
        customer = fake.customer()
        fake.subscribe(customer, fake.price(fake.meter(), "10"))
        fake.use(customer, "2.5", "before")
        fake.post("settings", {"after_last_retry": "canceled"})
        fake.raw("POST", "/v1/products", {"name": "A"}, Idempotency_Key="k")
        fake.listen(receiver, "invoice.created")
        receiver.always = 500
        fake.move(FIRST_END + 60, settle_seconds=0)
        receiver.wait_for("invoice.created", accepted=False)
    with run_fake(path) as fake:
        assert fake.now() == FIRST_END + 60
        assert fake.get("settings")["after_last_retry"] == "canceled"
        receiver.always = 200
        receiver.wait_for("invoice.created")  # it was still pending
        fake.post("settle")
        replayed = fake.raw("POST", "/v1/products", {"name": "A"}, Idempotency_Key="k")
        assert "idempotent-replayed" not in replayed.headers  # a month has passed on this clock
        fake.use(customer, "1", "after", at=FIRST_END - 1)
        fake.move(fake.invoices(customer)[0].automatically_finalizes_at)
        invoice = fake.invoices(customer)[0]
        assert (invoice.status, invoice.lines.data[0].quantity_decimal) == ("paid", Decimal("3.5"))
        ids = {product.id for product in fake.client.v1.products.list().data}
        assert fake.client.v1.products.create({"name": "B"}).id not in ids


def test_answers_survive_a_restart(run_fake: Callable[..., Any], tmp_path: Path) -> None:
    answers = []
    for _ in range(2):
        with run_fake(tmp_path / "state.db") as fake:
            answers.append(fake.raw("POST", "/v1/customers", {"name": "A"}, Idempotency_Key="k").json())
    assert answers[0] == answers[1]


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_server_saves_before_it_stops(run_fake: Callable[..., Any], tmp_path: Path, stop: signal.Signals) -> None:
    path = tmp_path / "state.db"
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    code = "import sys; from pathlib import Path; from tallystick.dev.fake_stripe.server import serve_fake_stripe as s;"
    code += "s('127.0.0.1', int(sys.argv[1]), Path(sys.argv[2]), 0)"
    with subprocess.Popen([sys.executable, "-c", code, str(port), str(path)]) as server:
        transport = httpx.HTTPTransport(retries=8)
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", transport=transport, auth=("sk_test_1", "")) as client:
            customer = client.post("/v1/customers", data={"name": "A"}).json()["id"]
            if stop == signal.SIGKILL:
                # The 0.2 s after which a change is on disk have passed when another reader sees it there.
                _wait_until_saved(path, customer)
        server.send_signal(stop)
    with run_fake(path) as fake:
        assert fake.client.v1.customers.retrieve(customer).name == "A"


def test_with_save_at_once_nobody_is_told_what_a_kill_would_lose(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tallystick.dev.fake_stripe.app.SAVE_SECONDS", 3600)
    path = tmp_path / "state.db"

    def is_saved(object_id: str) -> bool:
        with closing(sqlite3.connect(path)) as reader:
            return bool(reader.execute("SELECT 1 FROM objects WHERE id = ?", (object_id,)).fetchone())

    class Doubter(Receiver):
        async def receive(self, request: Request) -> Response:
            told.append(is_saved(json.loads(await request.body())["id"]))
            return await super().receive(request)

    told: list[bool] = []
    receiver = Doubter()
    app = create_fake_stripe(path, webhook_retry_seconds=(0.05,), save_at_once=True)
    hook = Starlette(routes=[Route("/hook", receiver.receive, methods=["POST"])])
    with serving(hook) as there, serving(app) as url, closing(Fake(url)) as fake:
        receiver.url = f"{there}/hook"
        fake.post("reset", {"to": START, "frozen": True})
        customer = fake.customer()
        assert is_saved(customer)
        fake.subscribe(customer, fake.price(fake.meter(), "10"))
        fake.listen(receiver, "invoice.created")
        # The clock waits for this webhook to be answered, so it goes out before any answer does.
        fake.move(FIRST_END + 7200)
        receiver.wait_for("invoice.created")

    assert told == [True]


def _wait_until_saved(path: Path, object_id: str) -> None:
    with closing(sqlite3.connect(path)) as reader:
        for _ in range(200):
            if reader.execute("SELECT 1 FROM objects WHERE id = ?", (object_id,)).fetchone():
                return
            time.sleep(0.02)
    raise AssertionError("the change was not saved within 4 s")


def test_same_seed_same_ids(run_fake: Callable[..., Any]) -> None:
    made = []
    for seed in (1, 1, 2):
        with run_fake(seed=seed) as fake:
            made.append((fake.customer(), fake.meter()))
    assert made[0] == made[1]
    assert made[0] != made[2]
    assert made[0][0].startswith("cus_")


def test_running_clock_performs_what_falls_due(run_fake: Callable[..., Any], receiver: Receiver) -> None:
    with run_fake() as fake:
        fake.listen(receiver, "customer.subscription.updated", "invoice.created")
        subscription = fake.subscribe(fake.customer(), fake.price(fake.meter(), interval="day"))
        end = subscription["items"].data[0].current_period_end
        fake.move(end - 1)
        receiver.wait_for("customer.subscription.updated")
        assert receiver.events("customer.subscription.updated")[0]["created"] == end
        assert abs(fake.now() - end) < 60
        assert abs(end - time.time()) > 80_000


def test_clock_goes_back_only_while_nothing_has_happened(run_fake: Callable[..., Any]) -> None:
    with run_fake() as fake:
        fake.post("clock", {"to": START, "frozen": True})
        assert fake.now() == START
        fake.customer()
        fake.post("clock", {"to": START - 1}, status=400)
        assert fake.post("clock", {"advance_seconds": 5})["now"] == START + 5


def at(*parts: int) -> int:
    return int(datetime(*parts, tzinfo=UTC).timestamp())  # type: ignore[arg-type,misc]


@pytest.mark.parametrize(
    ("anchor", "interval", "count", "after", "end"),
    [
        (at(2026, 1, 31, 1, 2, 3), "month", 1, at(2026, 2, 28, 1, 2, 3), at(2026, 3, 31, 1, 2, 3)),
        (at(2024, 2, 29), "year", 1, at(2024, 2, 29), at(2025, 2, 28)),
        (at(2024, 2, 29), "year", 1, at(2027, 3, 1), at(2028, 2, 29)),
        (at(2025, 11, 30), "month", 3, at(2025, 11, 30), at(2026, 2, 28)),
        (at(2026, 3, 1), "week", 2, at(2026, 3, 15), at(2026, 3, 29)),
        (at(2026, 3, 1), "day", 1, at(2026, 2, 20, 0, 0, 1), at(2026, 2, 21)),
        (at(2026, 12, 31), "month", 1, at(2026, 1, 1), at(2026, 1, 31)),
    ],
)
def test_period_boundaries(anchor: int, interval: str, count: int, after: int, end: int) -> None:
    assert next_boundary(anchor, interval, count, after) == end


def test_boundaries_are_without_gap() -> None:
    anchor = at(2026, 1, 31, 23, 59, 59)
    steps = [boundary(anchor, "month", 1, index) for index in range(-30, 30)]
    for earlier, later in pairwise(steps):
        assert next_boundary(anchor, "month", 1, earlier) == later
        assert next_boundary(anchor, "month", 1, later - 1) == later


def test_form_parameters_take_the_types_of_the_sdk() -> None:
    raw = parse_form("customer=cus_1&items[0][quantity]=2&items[0][price]=p&metadata[a]=1&expand[]=x&trial_end=now")
    assert check(shape_of("SubscriptionCreateParams"), raw) == {
        "customer": "cus_1",
        "items": [{"quantity": 2, "price": "p"}],
        "metadata": {"a": "1"},
        "expand": ["x"],
        "trial_end": "now",
    }
