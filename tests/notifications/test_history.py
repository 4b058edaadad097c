"""Dead ones are seen and sent again, old ones are forgotten, and nothing is told out of turn."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client import generate_latest
from sqlalchemy import text
from starlette.responses import Response
from typer.testing import CliRunner, Result

from tallystick import cli, db
from tallystick.config import Settings
from tallystick.metrics import REGISTRY
from tallystick.notifications.delivery import deliver_notifications
from tallystick.notifications.history import (
    KEEP_DEAD,
    KEEP_DELIVERED,
    WAIT_FOR_ENDPOINT,
    list_deliveries,
    measure_notifications,
    replay,
    retire_notifications,
)
from tallystick.resources import Resources
from tallystick.rules import RulesFile
from tests.notifications.receiving import Receiver, endpoint, make_due, read, states, tell, with_endpoints
from tests.webhooks.stripe_events import deliver, event, subscription

GONE = 410


def now() -> datetime:
    return datetime.now(UTC)


@pytest.fixture
def told(resources: Resources, product: Receiver, tmp_path: Path) -> Resources:
    return with_endpoints(resources, tmp_path, endpoint("product", product.url))


async def make_dead(told: Resources, product: Receiver, *customers: str) -> list[str]:
    """Notifications that the product did not want at the time; their ids."""
    product.answers += [Response(status_code=GONE) for _ in customers]
    ids = await tell(told, *customers)
    await deliver_notifications(told, now())
    product.received.clear()
    return ids


async def test_the_dead_are_seen_with_the_reason(told: Resources, product: Receiver) -> None:
    (dead,) = await make_dead(told, product, "cus_1")
    await tell(told, "cus_2")
    await deliver_notifications(told, now())
    [row] = await list_deliveries(told, states=("dead",), limit=10)
    assert (row["id"], row["endpoint"], row["outcome"], row["attempts"]) == (dead, "product", "status 410", 1)
    assert [row["customer"] for row in await list_deliveries(told, limit=10)] == ["cus_2", "cus_1"]
    assert [row["customer"] for row in await list_deliveries(told, limit=1)] == ["cus_2"]


async def test_dead_ones_are_sent_again_under_their_ids(told: Resources, product: Receiver) -> None:
    ids = await make_dead(told, product, "cus_1", "cus_1", "cus_2")
    assert [row["state"] for row in await replay(told, ids[:1], now())] == ["queued"]
    await deliver_notifications(told, now())
    assert product.ids == ids[:1]
    assert len(await replay(told, None, now())) == 2
    await deliver_notifications(told, now())
    assert sorted(product.ids) == sorted(ids)
    assert await replay(told, None, now()) == []
    assert await replay(told, ids, now()) == [], "what was delivered is not sent again"


async def test_a_waiting_one_can_be_sent_at_once(told: Resources, product: Receiver) -> None:
    product.answers.append(Response(status_code=500))
    ids = await tell(told, "cus_1")
    await deliver_notifications(told, now())
    assert [row["id"] for row in await replay(told, ids, now())] == ids
    await deliver_notifications(told, now())
    assert await states(told) == [("delivered", 2, "status 204")]


async def test_a_state_is_not_told_after_a_newer_one(
    told: Resources, product: Receiver, client: httpx.AsyncClient
) -> None:
    product.answers += [Response(status_code=GONE), Response(status_code=GONE)]
    for at, status in enumerate(("active", "past_due", "active")):
        await deliver(client, event("customer.subscription.updated", subscription(status=status), at=at))
        await deliver_notifications(told, now())
    before = product.ids
    assert [state for state, *_ in await states(told)] == ["dead"] * 2 + ["delivered"] * 4
    assert {row["state"] for row in await replay(told, None, now())} == {"superseded"}
    await deliver_notifications(told, now())
    assert product.ids == before
    assert json.loads(product.received[-1].body)["data"]["access"] == "active"


async def test_a_state_that_is_still_the_newest_told_is_sent_again(
    told: Resources, product: Receiver, client: httpx.AsyncClient
) -> None:
    await deliver(client, event("customer.subscription.updated", subscription(status="active"), at=0))
    await deliver_notifications(told, now())
    product.answers += [Response(status_code=GONE), Response(status_code=GONE)]
    await deliver(client, event("customer.subscription.updated", subscription(status="past_due"), at=1))
    await deliver_notifications(told, now())
    assert [row["state"] for row in await replay(told, None, now())] == ["queued", "queued"]
    await deliver_notifications(told, now())
    assert json.loads(product.received[-1].body)["data"]["access"] == "restricted"


async def test_a_replayed_one_goes_before_the_later_ones_that_still_wait(told: Resources, product: Receiver) -> None:
    (dead,) = await make_dead(told, product, "cus_1")
    product.answers.append(Response(status_code=500))
    (later,) = await tell(told, "cus_1")
    await deliver_notifications(told, now())
    await replay(told, None, now())
    await make_due(told)
    await deliver_notifications(told, now())
    assert product.ids == [later, dead, later]


async def test_states_that_nobody_was_told_are_replayed_in_their_order(
    told: Resources, product: Receiver, client: httpx.AsyncClient
) -> None:
    product.answers += [Response(status_code=GONE) for _ in range(4)]
    for at, status in enumerate(("active", "past_due")):
        await deliver(client, event("customer.subscription.updated", subscription(status=status), at=at))
        await deliver_notifications(told, now())
    product.received.clear()
    assert {row["state"] for row in await replay(told, None, now())} == {"queued"}
    await deliver_notifications(told, now())
    bodies = [json.loads(got.body) for got in product.received]
    assert [body["data"]["access"] for body in bodies if body["type"] == "access.changed"] == ["active", "restricted"]


async def age(resources: Resources, by: timedelta) -> None:
    async with db.transaction(resources.engine) as connection:
        for column in (
            "notifications.created_at",
            "notification_deliveries.created_at",
            "notification_deliveries.settled_at",
        ):
            table, name = column.split(".")
            await connection.execute(text(f"UPDATE {table} SET {name} = {name} - CAST(:by AS interval)"), {"by": by})  # noqa: S608


async def test_what_was_told_is_forgotten_in_time_and_what_was_not_is_kept_longer(
    told: Resources, product: Receiver
) -> None:
    await make_dead(told, product, "cus_1")
    product.answers.append(Response(status_code=500))
    await tell(told, "cus_2")  # waits
    await deliver_notifications(told, now())
    await tell(told, "cus_3")  # delivered
    await deliver_notifications(told, now())
    await age(told, KEEP_DELIVERED - timedelta(hours=1))
    assert await retire_notifications(told, now()) == 0
    await age(told, timedelta(hours=2))
    assert await retire_notifications(told, now()) == 1
    assert [state for state, *_ in await states(told)] == ["dead", "pending"]
    await age(told, KEEP_DEAD - KEEP_DELIVERED)
    assert await retire_notifications(told, now()) == 1
    assert [state for state, *_ in await states(told)] == ["pending"]


async def test_what_nobody_wanted_is_forgotten_too_but_not_before_it_was_looked_at(
    resources: Resources, tmp_path: Path
) -> None:
    nobody = with_endpoints(resources, tmp_path)
    await tell(nobody, "cus_1")
    await age(nobody, KEEP_DELIVERED + timedelta(hours=1))
    assert await retire_notifications(nobody, now()) == 0
    await deliver_notifications(nobody, now())
    assert await retire_notifications(nobody, now()) == 1
    assert await read(nobody, "SELECT id FROM notifications") == []


async def test_what_waits_for_an_endpoint_that_is_gone_is_given_up_after_three_days(
    told: Resources, product: Receiver, tmp_path: Path
) -> None:
    product.answers.append(Response(status_code=500))
    await tell(told, "cus_1")
    await deliver_notifications(told, now())
    gone = with_endpoints(told, tmp_path)
    await age(told, WAIT_FOR_ENDPOINT - timedelta(hours=1))
    await retire_notifications(gone, now())
    assert [state for state, *_ in await states(told)] == ["pending"]
    await age(told, timedelta(hours=2))
    await retire_notifications(told, now())
    assert [state for state, *_ in await states(told)] == ["pending"], "its endpoint is still there"
    await retire_notifications(gone, now())
    assert await states(told) == [("dead", 1, "endpoint unknown")]


async def test_the_gauges_show_what_waits_and_what_is_dead(told: Resources, product: Receiver) -> None:
    await make_dead(told, product, "cus_1")
    product.answers.append(Response(status_code=500))
    await tell(told, "cus_2")
    await deliver_notifications(told, now())
    await measure_notifications(told, now() + timedelta(minutes=5))
    metrics = generate_latest(REGISTRY).decode()
    assert 'tallystick_notifications_by_state{state="dead"} 1.0' in metrics
    assert 'tallystick_notifications_by_state{state="waiting"} 1.0' in metrics
    age_ = float(metrics.partition("\ntallystick_oldest_waiting_notification_seconds ")[2].partition("\n")[0])
    assert 300 <= age_ < 400
    assert 'tallystick_notification_tries_total{endpoint="product",outcome="dead"}' in metrics


@pytest.fixture
def environment(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "DATABASE_URL": settings.database_url.replace("+asyncpg", ""),
        "REDIS_URL": settings.redis_url,
        "STRIPE_API_KEY": "sk_test_for_tests",
        "STRIPE_WEBHOOK_SECRET": "whsec_for_tests",
        "STRIPE_API_BASE": settings.stripe_api_base,
    }.items():
        monkeypatch.setenv(name, value)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, ["notifications", *arguments], catch_exceptions=False)


@pytest.fixture
async def one_dead(told: Resources, product: Receiver) -> dict[str, Any]:
    await make_dead(told, product, "cus_1")
    [row] = await list_deliveries(told, limit=10)
    return row


@pytest.mark.usefixtures("environment")
def test_the_command_lists_and_replays(one_dead: dict[str, Any]) -> None:
    for arguments in (("list",), ("list", "--dead")):
        assert one_dead["id"] in run(*arguments).stdout
        [listed] = json.loads(run(*arguments, "--json").stdout)
        assert (listed["id"], listed["state"], listed["outcome"]) == (one_dead["id"], "dead", "status 410")
    assert run("replay").exit_code == 1
    unknown = run("replay", "msg_unknown")
    assert (unknown.exit_code, "msg_unknown" in unknown.stderr) == (1, True)
    done = run("replay", "--dead")
    assert (done.exit_code, done.stdout) == (0, "To be sent: 1. Superseded: 0.\n")
    assert json.loads(run("list", "--dead", "--json").stdout) == []
    [waiting] = json.loads(run("replay", one_dead["id"], "--json").stdout)
    assert waiting == {"id": one_dead["id"], "endpoint": "product", "customer": "cus_1", "state": "pending"}


async def test_a_changed_rules_file_holds_without_a_restart(
    resources: Resources, product: Receiver, tmp_path: Path
) -> None:
    named = with_endpoints(resources, tmp_path, endpoint("product", product.url))
    rules: RulesFile = named.rules
    assert rules.path is not None
    await tell(named, "cus_1")
    await deliver_notifications(named, now())
    rules.path.write_text(rules.path.read_text().replace("/hooks", "/moved"))
    await tell(named, "cus_1")
    await make_due(named)
    await deliver_notifications(named, now() + timedelta(seconds=10))
    assert [got.path for got in product.received] == ["/hooks", "/moved"]
