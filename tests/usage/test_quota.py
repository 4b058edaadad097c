from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from tallystick import db
from tallystick.auth import create_key
from tallystick.resources import Resources
from tallystick.rules import Rules
from tallystick.usage.events import UsageEvent
from tallystick.usage.ledger import record_events
from tallystick.usage.thresholds import announce_thresholds
from tests.usage.making import CUSTOMER, METER, make_customer, make_event, make_meter, make_period, run

NOW = datetime.now(UTC).replace(microsecond=0)
START = NOW - timedelta(days=3)
RULES = Rules.model_validate(
    {"meters": {METER: {"quota": "100", "thresholds": ["50", "90"]}, "seats": {"quota": 5}, "plain": {}}}
)


@pytest.fixture
async def asked(app: FastAPI, client: httpx.AsyncClient, resources: Resources) -> httpx.AsyncClient:
    resources.rules.rules = app.state.resources.rules.rules = RULES
    return client


async def record(resources: Resources, *events: UsageEvent) -> None:
    async with db.transaction(resources.engine) as connection:
        await record_events(connection, events, accepted_already=True)


async def ask(client: httpx.AsyncClient, ref: str = "acme", **params: str) -> Any:
    answer = await client.get(f"/v1/customers/{ref}/quota", params=params)
    assert answer.status_code == 200, answer.text
    return answer.json()


async def test_a_quota_is_measured_in_the_present_billing_period(
    asked: httpx.AsyncClient, resources: Resources
) -> None:
    await make_customer(resources, boundaries=(START,))
    await make_meter(resources)
    await make_period(resources, START, START + timedelta(days=30))
    await record(
        resources,
        make_event("before", value="1000", at=START - timedelta(seconds=1)),
        make_event("at", value="12.5", at=START),
        make_event("now", value="47.5", customer_ref=CUSTOMER),
    )
    await announce_thresholds(resources, datetime.now(UTC))
    answer = await ask(asked, meter=METER)
    (shown,) = answer["data"]
    assert answer["customer"] == CUSTOMER
    assert datetime.fromisoformat(shown["start"]) == START
    assert datetime.fromisoformat(shown["end"]) == START + timedelta(days=30)
    assert (shown["used"], shown["events"], shown["quota"], shown["remaining"]) == ("60", 2, "100", "40")
    assert shown["next_threshold"] == "90"
    ((reached),) = shown["reached"]
    assert (reached["threshold"], reached["reached_at"] is None) == ("50", False)


async def test_a_quota_that_is_used_up_has_nothing_left_and_says_by_how_much(
    asked: httpx.AsyncClient, resources: Resources
) -> None:
    await make_customer(resources)
    await record(resources, make_event(value="150"))
    shown = {row["meter"]: row for row in (await ask(asked))["data"]}
    assert shown.keys() == {METER, "seats"}
    assert (shown[METER]["used"], shown[METER]["remaining"], shown[METER]["next_threshold"]) == ("150", "0", None)
    assert [each["reached_at"] for each in shown[METER]["reached"]] == [None, None]
    assert (shown["seats"]["used"], shown["seats"]["remaining"], shown["seats"]["aggregation"]) == ("0", "5", None)


async def test_a_threshold_that_was_told_stays_reached(asked: httpx.AsyncClient, resources: Resources) -> None:
    await make_customer(resources)
    await record(resources, make_event(value="60"))
    await announce_thresholds(resources, datetime.now(UTC))
    await record(resources, make_event("minus", value="-20"))
    (shown,) = (await ask(asked, meter=METER))["data"]
    assert (shown["used"], shown["next_threshold"]) == ("40", "90")
    assert [each["threshold"] for each in shown["reached"]] == ["50"]


async def test_a_reference_that_is_not_linked_yet_has_used_something_too(
    asked: httpx.AsyncClient, resources: Resources
) -> None:
    await record(resources, make_event(value="3", customer_ref="nobody"))
    answer = await ask(asked, "nobody", meter=METER)
    assert (answer["customer"], answer["data"][0]["used"]) == (None, "3")


async def test_different_values_are_counted_once_in_the_period(asked: httpx.AsyncClient, resources: Resources) -> None:
    await make_customer(resources, boundaries=(START, START + timedelta(days=30)))
    await record(resources, make_event(), make_event("e2", at=NOW - timedelta(hours=2)))
    await run(resources, "UPDATE usage_totals SET aggregation = 'unique_count'")
    for digest in ("a", "b"):
        await run(
            resources,
            "INSERT INTO usage_uniques SELECT id, convert_to(:digest, 'UTF8') FROM usage_totals"
            " WHERE :digest = 'a' OR bucket_end > now()",
            digest=digest,
        )
    (shown,) = (await ask(asked, meter=METER))["data"]
    assert (shown["used"], shown["aggregation"]) == ("2", "unique_count")


async def test_what_cannot_be_asked_is_named(asked: httpx.AsyncClient, resources: Resources) -> None:
    answer = await asked.get("/v1/customers/acme/quota", params={"meter": "plain"})
    assert (answer.status_code, answer.json()["type"]) == (404, "urn:tallystick:problem:no-quota")
    async with db.transaction(resources.engine) as connection:
        key = await create_key(connection, name="access", source="tests", scopes=["access:read"])
    refused = await asked.get("/v1/customers/acme/quota", headers={"Authorization": f"Bearer {key}"})
    assert refused.status_code == 403
