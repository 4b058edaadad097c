"""Ten ways in which usage or its billing is known to go wrong elsewhere, by number. None may be possible here."""

import asyncio
import sys
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from sqlalchemy import text

from tallystick import db
from tallystick.app import create_app
from tallystick.auth import create_key
from tallystick.config import Settings
from tallystick.dev.embedded import EmbeddedValkey
from tallystick.resources import Resources, open_resources
from tallystick.usage import buffer, ingest, ledger
from tallystick.usage.buffer import BufferUnavailable, claim_and_append
from tallystick.usage.delivery import deliver_all
from tallystick.usage.drain import drain
from tallystick.usage.ingest import Breaker
from tallystick.usage.ledger import record_events
from tallystick.usage.sealing import seal_due, seal_everything
from tallystick.webhooks.refresh import refresh_mirror
from tests.conftest import WEBHOOK_SECRET, FakeStripe, open_client
from tests.serving import serve
from tests.usage.making import (
    METER,
    conservation,
    last_hour,
    make_boundaries,
    make_customer,
    make_event,
    make_meter,
    read_all,
)
from tests.usage.test_delivery import make_deliveries, misbehave, next_due, taken_by_stripe
from tests.usage.test_ingest import StoppedClock
from tests.webhooks.stripe_events import customer as stripe_customer
from tests.webhooks.stripe_events import event as stripe_event
from tests.webhooks.stripe_events import post as post_webhook

NOW = datetime.now(UTC)
DAY = timedelta(days=1)


def use(id: str, value: str = "1", at: datetime | None = None, **more: object) -> dict[str, object]:
    given: dict[str, object] = {} if at is None else {"timestamp": at.isoformat()}
    return {"id": id, "customer": "acme", "meter": METER, "value": value} | given | more


async def post(client: httpx.AsyncClient, *events: dict[str, object]) -> tuple[int, int, int, list[str]]:
    answer = await client.post("/v1/usage", json=list(events))
    body = answer.json()
    codes = [rejected["code"] for rejected in body.get("rejected", [])]
    return answer.status_code, body.get("accepted", 0), body.get("duplicates", 0), codes


async def counted(resources: Resources) -> tuple[object, int]:
    """What the ledger has, after everything that waits has arrived."""
    await drain(resources, datetime.now(UTC), reclaim_after=timedelta(0))
    found = await conservation(resources)
    return found.accepted, found.events


@pytest.fixture
async def api(client: httpx.AsyncClient, resources: Resources) -> httpx.AsyncClient:
    await make_customer(resources)
    await make_meter(resources)
    return client


async def fail(*_: object, **__: object) -> Any:
    raise OSError("a test")


async def test_complaint_1_a_key_claimed_before_the_write_does_not_swallow_the_retry(
    api: httpx.AsyncClient, app: FastAPI, resources: Resources, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def claim_and_lose(*arguments: Any, **more: Any) -> list[Any]:
        await claim_and_append(*arguments, **more)
        raise BufferUnavailable("the answer was lost")

    for claim in (claim_and_lose, fail_to_claim):
        with monkeypatch.context() as patch:
            patch.setattr(buffer, "claim_and_append", claim)
            patch.setattr(ingest, "record_events", fail)
            assert (await post(api, use(claim.__name__)))[0] == 503
        app.state.breaker = Breaker()
        assert (await post(api, use(claim.__name__)))[0] == 202
    assert await counted(resources) == (2, 2)


async def fail_to_claim(*_: object, **__: object) -> Any:
    raise BufferUnavailable("nothing was claimed")


async def test_complaint_2_what_redis_has_seen_is_not_lost_with_redis(
    settings: Settings, resources: Resources, api_key: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    await make_customer(resources)
    await make_meter(resources)
    valkey = EmbeddedValkey(tmp_path_factory.mktemp("own") / "valkey")
    await asyncio.to_thread(valkey.start)
    try:
        own = settings.model_copy(update={"redis_url": valkey.url})
        application = create_app(own)
        async with application.router.lifespan_context(application), open_client(application, api_key) as client:
            assert (await post(client, use("a"), use("b")))[:2] == (202, 2)
            await asyncio.to_thread(valkey.kill)
            await asyncio.to_thread(valkey.start)
            application.state.breaker = Breaker()
            assert (await post(client, use("a"), use("b")))[1:3] == (0, 2), "it still knows what it has seen"
            assert await counted(application.state.resources) == (2, 2)
            # Even if it forgets everything: the ledger does not.
            await application.state.resources.redis.flushall()
            assert (await post(client, use("a"), use("b"), use("c")))[0] == 202
            assert await counted(application.state.resources) == (3, 3)
    finally:
        await asyncio.to_thread(valkey.stop)


async def test_complaint_3_backdated_usage_that_is_accepted_is_counted_and_sent(
    client: httpx.AsyncClient, resources: Resources, fake_stripe: FakeStripe
) -> None:
    await make_deliveries(resources, fake_stripe)
    oldest = datetime.now(UTC) - 34 * DAY + timedelta(minutes=1)
    assert (await post(client, use("old", "5", oldest)))[:2] == (202, 1)
    assert (await post(client, use("older", "7", oldest - timedelta(hours=1))))[3] == ["timestamp_too_old"]
    await seal_everything(resources, datetime.now(UTC))
    await deliver_all(resources, datetime.now(UTC))
    assert [value for _, value in await taken_by_stripe(fake_stripe)] == [5]
    asked = {"customer": "acme", "window": "month", "from": (NOW - 40 * DAY).replace(minute=0, second=0, microsecond=0)}
    shown = (await client.get("/v1/usage", params=asked)).json()  # type: ignore[arg-type]
    assert [row["quantity"] for row in shown["data"]] == ["5"]
    assert await counted(resources) == (5, 1)


async def test_complaint_4_one_bad_event_does_not_fail_its_batch(api: httpx.AsyncClient, resources: Resources) -> None:
    assert (await post(api, use("a")))[1] == 1
    batch = [use("a"), use("a", "2"), use("b", "x"), use("c", meter="unheard of"), use("d", "3")]
    assert await post(api, *batch) == (202, 1, 1, ["conflict", "invalid_value", "unknown_meter"])
    assert await counted(resources) == (4, 2)


async def test_complaint_4_no_half_of_a_batch_is_committed(
    api: httpx.AsyncClient, app: FastAPI, resources: Resources, monkeypatch: pytest.MonkeyPatch
) -> None:
    app.state.breaker.until = sys.maxsize  # the ledger is written directly
    batch = [use(f"e{number}", at=last_hour() - timedelta(hours=number)) for number in range(5)]
    totals = "SELECT count(*) FROM usage_totals"
    with monkeypatch.context() as patch:
        # Stamps and totals are written by then; what fails is the last step.
        patch.setattr(ledger, "RECORD", text("SELECT 1 / (CAST(:number AS integer) * 0)"))
        assert (await post(api, *batch, use("stamped")))[0] == 503
        assert await read_all(resources, totals) == [(0,)]
        assert await read_all(resources, "SELECT count(*) FROM usage_stamps") == [(0,)]
    assert (await post(api, *batch, use("stamped")))[:2] == (202, 6)
    assert await counted(resources) == (6, 6)


async def test_complaint_5_a_retry_without_a_timestamp_counts_once_even_across_midnight(
    api: httpx.AsyncClient, app: FastAPI, resources: Resources, monkeypatch: pytest.MonkeyPatch
) -> None:
    midnight = NOW.replace(hour=0, minute=0, second=0, microsecond=0)
    clock = StoppedClock(midnight - timedelta(seconds=1))
    monkeypatch.setattr(ingest, "datetime", clock)
    assert (await post(api, use("buffered"), use("both ways")))[1] == 2
    clock.stands_at = midnight + timedelta(seconds=1)
    assert (await post(api, use("buffered")))[2] == 1
    app.state.breaker.until = sys.maxsize
    assert (await post(api, use("both ways"), use("direct")))[0] == 202
    assert await counted(resources) == (3, 3)
    clock.stands_at = midnight + timedelta(hours=1)
    assert (await post(api, use("direct"), use("both ways"), use("buffered")))[0] == 202
    assert await counted(resources) == (3, 3)


async def test_complaint_5_many_senders_drains_and_deliveries_at_once_count_once(
    client: httpx.AsyncClient, resources: Resources, fake_stripe: FakeStripe
) -> None:
    await make_deliveries(resources, fake_stripe)
    batch = [use(f"e{number}", "1.5", last_hour() - timedelta(hours=number % 3)) for number in range(20)]
    answers = await asyncio.gather(*(post(client, *batch) for _ in range(5)))
    assert sum(accepted for _, accepted, _, _ in answers) == 20
    for work in (drain, seal_everything, deliver_all):
        await asyncio.gather(*(work(resources, datetime.now(UTC)) for _ in range(3)))
    assert sum(value for _, value in await taken_by_stripe(fake_stripe)) == 30


@pytest.mark.parametrize(
    "fault",
    [{"kind": "timeout_after", "seconds": 0}, {"kind": "error_500_after"}, {"kind": "rate_limit", "cached": True}],
    ids=lambda fault: fault["kind"],
)
async def test_complaint_6_a_repeated_call_bills_once_and_is_not_answered_from_an_old_one(
    resources: Resources, fake_stripe: FakeStripe, fault: dict[str, Any]
) -> None:
    await make_deliveries(resources, fake_stripe, "5")
    await misbehave(fake_stripe, times=2, **fault)
    for _ in range(4):
        await deliver_all(resources, await next_due(resources))
    assert [value for _, value in await taken_by_stripe(fake_stripe)] == [5]
    assert await read_all(resources, "SELECT state FROM usage_deliveries") == [("sent",)]


async def test_complaint_7_usage_is_billed_in_the_period_in_which_it_was_used_or_received(
    api: httpx.AsyncClient, resources: Resources, monkeypatch: pytest.MonkeyPatch
) -> None:
    end = last_hour(17) + timedelta(seconds=23)  # a period ends at an odd second
    await make_boundaries(resources, end)
    for id, at in (("last", end - timedelta(microseconds=1)), ("first", end)):
        assert (await post(api, use(id, at=at)))[1] == 1
    clock = StoppedClock(end - timedelta(seconds=1))
    monkeypatch.setattr(ingest, "datetime", clock)
    assert (await post(api, use("stamped in time", "10")))[1] == 1
    clock.stands_at = end + timedelta(seconds=1)
    assert (await post(api, use("stamped after", "100")))[1] == 1
    # Hours after the period's end.
    await drain(resources, datetime.now(UTC))
    await seal_due(resources, datetime.now(UTC) + timedelta(hours=2))
    sent = await read_all(resources, "SELECT to_timestamp(timestamp), value FROM usage_deliveries")
    assert {(at < end, value) for at, value in sent} == {(True, 11), (False, 101)}  # type: ignore[operator]


async def test_complaint_8_what_is_too_old_or_another_body_is_refused_by_name(
    api: httpx.AsyncClient, resources: Resources
) -> None:
    at = last_hour()
    assert await post(api, use("a", at=NOW - 36 * DAY)) == (422, 0, 0, ["timestamp_too_old"])
    assert (await post(api, use("b", at=at)))[1] == 1
    for other in (use("b", "2", at), use("b", at=at - timedelta(seconds=1)), use("b", at=at, customer="globex")):
        assert await post(api, other) == (422, 0, 0, ["conflict"])
    assert await counted(resources) == (1, 1)
    # Where Redis has forgotten the id, the sender was told 202 already: the other body is kept for somebody to see.
    await resources.redis.flushdb()
    assert (await post(api, use("b", "2", at)))[1] == 1
    assert await counted(resources) == (1, 1)
    assert await read_all(resources, "SELECT id, value FROM usage_conflicts") == [("b", 2)]


async def test_complaint_8_usage_that_has_become_too_old_for_stripe_is_parked_and_not_dropped(
    resources: Resources, fake_stripe: FakeStripe
) -> None:
    await make_deliveries(resources, fake_stripe)
    async with db.transaction(resources.engine) as connection:
        await record_events(connection, [make_event(at=NOW - 34 * DAY)], accepted_already=True)
    await seal_everything(resources, NOW + 2 * DAY)
    await deliver_all(resources, NOW + 2 * DAY)
    assert await read_all(resources, "SELECT state, reason FROM usage_deliveries") == [("parked", "older_than_35_days")]
    assert (await conservation(resources)).parked == 1


async def test_complaint_9_all_entitlements_are_listed_and_not_only_those_of_the_summary(
    settings: Settings, resources: Resources, fake_stripe: FakeStripe, api_key: str
) -> None:
    application, stripe = create_app(settings), fake_stripe.client.v1
    async with serve(application) as url, open_client(application, api_key) as client:
        endpoint = {"url": f"{url}/webhooks/stripe", "secret": WEBHOOK_SECRET, "enabled_events": ["*"]}
        (await fake_stripe.control.post("/_fake/webhook_endpoints", json=endpoint)).raise_for_status()
        product = await stripe.products.create_async({"name": "All"})
        for number in range(12):
            feature = await stripe.entitlements.features.create_async(
                {"name": f"f{number}", "lookup_key": f"key-{number:02}"}
            )
            await stripe.products.features.create_async(product.id, {"entitlement_feature": feature.id})
        price = await stripe.prices.create_async(
            {"product": product.id, "currency": "eur", "unit_amount": 1, "recurring": {"interval": "month"}}
        )
        customer = await stripe.customers.create_async({})
        card = await stripe.payment_methods.attach_async("pm_card_visa", {"customer": customer.id})
        await stripe.customers.update_async(customer.id, {"invoice_settings": {"default_payment_method": card.id}})
        await stripe.subscriptions.create_async({"customer": customer.id, "items": [{"price": price.id}]})
        (await fake_stripe.control.post("/_fake/settle", json={})).raise_for_status()
        await refresh_mirror(resources, datetime.now(UTC))
        shown = (await client.get(f"/v1/customers/{customer.id}/access")).json()
    assert shown["entitlements"] == [f"key-{number:02}" for number in range(12)]


async def test_complaint_9_a_webhook_is_claimed_by_the_database_with_or_without_redis(
    settings: Settings, resources: Resources
) -> None:
    application = create_app(settings.model_copy(update={"redis_url": "redis://127.0.0.1:1/0"}))
    async with application.router.lifespan_context(application), open_client(application, None) as client:
        sent = stripe_event("customer.created", stripe_customer())
        answers = await asyncio.gather(*(post_webhook(client, sent) for _ in range(5)))
    verdicts = sorted(answer.json()["verdict"] for answer in answers)
    assert verdicts == ["applied", *["duplicate"] * 4]
    assert await read_all(resources, "SELECT count(*) FROM stripe_events") == [(1,)]


async def test_complaint_10_one_header_does_not_make_one_event_of_a_batch(
    api: httpx.AsyncClient, resources: Resources
) -> None:
    api.headers["Idempotency-Key"] = "the same for all"
    assert (await post(api, use("a"), use("b"), use("c")))[1] == 3
    assert (await post(api, use("d")))[1] == 1
    assert await counted(resources) == (4, 4)


async def test_complaint_10_the_ids_of_one_source_are_not_those_of_another(
    api: httpx.AsyncClient, app: FastAPI, resources: Resources
) -> None:
    async with db.transaction(resources.engine) as connection:
        other = await create_key(connection, name="other", source="another service", scopes=["usage:write"])
    assert (await post(api, use("a")))[1] == 1
    async with open_client(app, other) as client:
        assert (await post(client, use("a", "2")))[1] == 1
        app.state.breaker.until = sys.maxsize
        assert (await post(client, use("b")))[1] == 1
    assert (await post(api, use("b", "4")))[1] == 1
    assert await counted(resources) == (8, 4)


async def test_complaint_10_usage_that_comes_days_late_adds_to_what_was_sent(
    client: httpx.AsyncClient, resources: Resources, fake_stripe: FakeStripe
) -> None:
    await make_deliveries(resources, fake_stripe)
    at = NOW - 5 * DAY
    work: tuple[Callable[[Resources, datetime], Awaitable[int]], ...] = (seal_everything, deliver_all)
    for id, value in (("a", "5"), ("b", "7"), ("c", "0.5")):
        assert (await post(client, use(id, value, at)))[1] == 1
        for run_once in work:
            await run_once(resources, datetime.now(UTC))
    assert sorted(value for _, value in await taken_by_stripe(fake_stripe)) == [Decimal("0.5"), 5, 7]
    async with open_resources(resources.settings, application_name="tests") as others:
        assert await counted(others) == (Decimal("12.5"), 3)
