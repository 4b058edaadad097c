"""`GET /v1/events/{id}`: what became of an event."""

from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest

from tallystick.resources import Resources
from tallystick.webhooks import failures, inbox
from tests.webhooks.stripe_events import NOON, checkout_session, deliver, event, invoice, post, price, subscription


async def ask(client: httpx.AsyncClient, sent: dict[str, Any]) -> dict[str, Any]:
    answer = await client.get(f"/v1/events/{sent['id']}")
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


async def test_an_applied_event_tells_what_it_changed(client: httpx.AsyncClient) -> None:
    sent = event("customer.subscription.created", subscription())
    started = datetime.now(UTC)
    await deliver(client, sent)

    report = await ask(client, sent)

    assert started <= datetime.fromisoformat(report.pop("received_at")) <= datetime.now(UTC)
    assert datetime.fromisoformat(report.pop("created")) == datetime.fromtimestamp(NOON, UTC)
    changes = report.pop("changes")
    assert report == {
        "id": sent["id"],
        "type": "customer.subscription.created",
        "livemode": False,
        "account": "",
        "api_version": "2026-10-28.endive",
        "object_id": "sub_1",
        "verdict": "applied",
        "why": None,
        "superseded_by": None,
    }
    assert [(line["what"], line["old"], line["new"]) for line in changes] == [
        ("subscription", None, "active"),
        ("access", None, "active"),
    ]
    assert changes == list(reversed((await client.get("/v1/customers/cus_1/timeline")).json()["lines"]))


async def test_an_event_may_be_applied_without_a_line(client: httpx.AsyncClient) -> None:
    sent = event("price.updated", price())
    await deliver(client, sent)

    report = await ask(client, sent)
    assert (report["verdict"], report["changes"]) == ("applied", [])


async def test_a_stale_event_names_the_newer_one(client: httpx.AsyncClient) -> None:
    newer = event("customer.subscription.updated", subscription(), at=2)
    late = event("customer.subscription.updated", subscription(status="trialing"), at=1)
    await deliver(client, newer, late)
    # What comes later is newer still, and not why the other was stale.
    await deliver(client, event("customer.subscription.updated", subscription(), at=3))

    report = await ask(client, late)
    assert (report["verdict"], report["superseded_by"], report["changes"]) == ("stale", newer["id"], [])
    assert report["why"] == f"sub_1 was known in a newer state, by {newer['id']}."


async def test_a_tie_says_so(client: httpx.AsyncClient) -> None:
    winner = event("customer.subscription.updated", subscription(), id_="evt_b")
    loser = event("customer.subscription.updated", subscription(status="past_due"), id_="evt_a")
    assert await deliver(client, winner, loser) == ["applied", "stale"]

    report = await ask(client, loser)
    assert report["superseded_by"] == "evt_b"
    assert "in the same second" in report["why"]


@pytest.mark.parametrize(
    ("type_", "payload", "why"),
    [
        ("charge.succeeded", {"id": "ch_1", "object": "charge"}, "Events of the type charge.succeeded change nothing"),
        ("checkout.session.completed", checkout_session(client_reference_id=None), "no usable client_reference_id"),
        ("customer.created", {"id": "acct_1", "object": "account"}, "Nothing of acct_1 is mirrored"),
        ("invoice.upcoming", {k: v for k, v in invoice().items() if k != "id"}, "an object without an id"),
    ],
)
async def test_an_ignored_event_says_why(
    client: httpx.AsyncClient, type_: str, payload: dict[str, Any], why: str
) -> None:
    sent = event(type_, payload)
    await deliver(client, sent)

    report = await ask(client, sent)
    assert report["verdict"] == "ignored"
    assert why in report["why"]


async def test_an_event_that_was_not_understood_is_in_quarantine(client: httpx.AsyncClient) -> None:
    sent = event("customer.subscription.updated", subscription(customer=None))
    assert await deliver(client, sent) == ["quarantined"]

    report = await ask(client, sent)
    assert (report["verdict"], report["why"]) == ("quarantined", "It could not be handled: no usable subscription.")


async def test_a_failing_event_is_counted_until_it_is_set_aside(
    client: httpx.AsyncClient, resources: Resources, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(inbox, "translate", fail)
    sent = event("customer.subscription.updated", subscription())
    assert [(await post(client, sent)).status_code for _ in range(2)] == [500, 500]

    report = await ask(client, sent)
    assert (report["verdict"], report["changes"]) == ("failing", [])
    assert report["why"] == "Handling it has failed once (ZeroDivisionError); Stripe sends it again."

    monkeypatch.setattr(failures, "FAILURES_APART", timedelta(0))
    assert [(await post(client, sent)).status_code for _ in range(3)] == [500, 500, 500]
    why = (await ask(client, sent))["why"]
    assert why == "Handling it has failed 4 times, an hour apart (ZeroDivisionError); Stripe sends it again."
    assert (await post(client, sent)).status_code == 200
    assert (await ask(client, sent))["verdict"] == "quarantined"


async def test_an_event_that_never_came_is_a_problem(client: httpx.AsyncClient) -> None:
    answer = await client.get("/v1/events/evt_nobody")
    assert (answer.status_code, answer.json()["type"]) == (404, "urn:tallystick:problem:unknown-event")
