"""Who has a place among those that are worked on: neither slow senders nor what hangs keep others out."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from sqlalchemy import text

from tallystick import crowd, db
from tallystick.crowd import MAX_AT_WORK, MAX_PORTALS_AT_WORK, Crowd
from tallystick.resources import Resources
from tallystick.usage.meters import MAX_ASKING
from tests.conftest import FakeStripe, open_client
from tests.slow import SlowBody, started
from tests.usage.making import METER, make_customer, make_meter
from tests.waiting import wait_until

EVENT = {"id": "e1", "customer": "acme", "meter": METER}
HANGS_SECONDS = 15


def find_crowd(app: Any) -> Crowd:
    """The one of a running application."""
    layer = app.middleware_stack
    while not isinstance(layer, Crowd):
        layer = layer.app
    return layer


@asynccontextmanager
async def hanging_writes(resources: Resources, client: httpx.AsyncClient) -> AsyncIterator[asyncio.Task[Any]]:
    """A request that is worked on until the block ends, because a table is locked for writes."""
    async with db.transaction(resources.engine) as connection:
        await connection.execute(text("LOCK TABLE customer_links IN SHARE MODE"))
        held = asyncio.create_task(client.delete("/v1/customers/nobody"))
        yield held
    await held


async def test_a_body_that_comes_late_needs_a_place_too(
    resources: Resources, api_key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crowd, "MAX_AT_WORK", 1)
    await make_customer(resources)
    await make_meter(resources)
    usage = SlowBody(b'{"id": "e1", "customer": "acme", ', b'"meter": "%s"}' % METER.encode())
    link = SlowBody(b'{"customer": ', b'"cus_1"}')
    async with asyncio.timeout(10), started(resources) as app, open_client(app, api_key) as client:
        assert (await client.post("/v1/usage", json=EVENT | {"id": "e0"})).status_code == 202
        headers = {"Content-Type": "application/json"}
        late = [
            asyncio.create_task(client.post("/v1/usage", content=usage, headers=headers)),
            asyncio.create_task(client.put("/v1/customers/acme", content=link, headers=headers)),
        ]
        await usage.half_is_read.wait()
        await link.half_is_read.wait()
        writes = find_crowd(app).writes

        async def is_full() -> bool:
            return writes.taken == 1

        async with hanging_writes(resources, client):
            await wait_until(is_full)
            usage.go_on.set()
            link.go_on.set()
            answers = await asyncio.gather(*late)
            reading = await client.post("/v1/access", json={"customers": ["acme"]})

        assert [(answer.status_code, answer.headers.get("retry-after")) for answer in answers] == [(503, "1")] * 2
        assert {answer.json()["type"] for answer in answers} == {"urn:tallystick:problem:unavailable"}
        assert reading.status_code == 200
        assert writes.taken == 0
        repeat = await client.post("/v1/usage", json=EVENT)
    assert repeat.json() == {"accepted": 1, "duplicates": 0, "rejected": []}  # nothing of the refused one was kept


async def end(calls: set[asyncio.Task[httpx.Response]]) -> None:
    """Cancel them, and again: Python before 3.12 loses a cancellation that comes together with what was waited for."""
    while calls:
        for call in calls:
            call.cancel()
        _, calls = await asyncio.wait(calls, timeout=0.1)


async def test_a_stripe_that_hangs_does_not_stop_usage(
    app: FastAPI, client: httpx.AsyncClient, resources: Resources, fake_stripe: FakeStripe
) -> None:
    await make_customer(resources)
    await make_meter(resources)
    assert (await client.post("/v1/usage", json=EVENT)).status_code == 202
    for method, path in (("POST", "/v1/billing_portal/sessions"), ("GET", "/v1/billing/meters")):
        rule = {"method": method, "path": path, "kind": "slow", "seconds": str(HANGS_SECONDS)}
        (await fake_stripe.control.post("/_fake/faults", json=rule)).raise_for_status()

    async def refused(calls: list[asyncio.Task[httpx.Response]], number: int) -> list[httpx.Response]:
        """The answers of those that found no place; all others wait for Stripe."""

        async def are_refused() -> bool:
            return sum(call.done() for call in calls) == number

        await wait_until(are_refused)
        return [call.result() for call in calls if call.done()]

    portals = [
        asyncio.create_task(client.post("/v1/portal/sessions", json={"customer": f"cus_{number}"}))
        for number in range(MAX_PORTALS_AT_WORK + 1)
    ]
    meters = [
        asyncio.create_task(client.post("/v1/usage", json=EVENT | {"id": f"u{number}", "meter": f"unknown-{number}"}))
        for number in range(MAX_AT_WORK)
    ]
    try:
        answers = await refused(portals, 1) + await refused(meters, MAX_AT_WORK - MAX_ASKING)
        accepted = await client.post("/v1/usage", json=EVENT | {"id": "e2"})
        still_waiting = sum(not call.done() for call in (*portals, *meters))
    finally:
        await end({*portals, *meters})
        await fake_stripe.control.delete("/_fake/faults")

    assert accepted.status_code == 202
    assert still_waiting == MAX_PORTALS_AT_WORK + MAX_ASKING
    assert {(answer.status_code, answer.headers["retry-after"]) for answer in answers} == {(503, "1")}
    assert find_crowd(app).writes.taken == 0
