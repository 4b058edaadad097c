"""PostgreSQL is put back to a backup, Stripe and Redis have gone on: the steps of docs/operations.md, one by one."""

import asyncio
import os
import re
import subprocess
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx
import pytest

from tallystick import db, schema
from tallystick.auth import SCOPES, create_key
from tallystick.dev.embedded import EmbeddedPostgres
from tallystick.resources import Resources, open_resources
from tallystick.usage.agreement import LAG
from tallystick.usage.delivery import deliver_all
from tallystick.usage.drain import drain
from tallystick.usage.meters import refresh_meters
from tallystick.usage.partitions import make_partitions
from tallystick.usage.reconciliation import compare_now, find_pairs
from tallystick.usage.sealing import seal_everything
from tallystick.webhooks.recovery import recover
from tests.conftest import FakeStripe, Servers, make_settings
from tests.recovery.shop import Shop, access_of, differing, receiving, refresh_all
from tests.usage.making import METER, conservation, read_all

NOW = datetime.now(UTC)
HOUR = NOW.replace(minute=0, second=0, microsecond=0)

DRIFTS = "SELECT hour, ours, stripes FROM usage_drifts WHERE resolved_at IS NULL ORDER BY hour"


def usage(id: str, hours_ago: int, value: int) -> dict[str, Any]:
    """An event of an hour that has ended; of the present second when it is 0 hours ago."""
    at = NOW if hours_ago == 0 else HOUR - timedelta(hours=hours_ago - 1, minutes=30)
    return {"id": id, "customer": "acme", "meter": METER, "value": value, "timestamp": at.isoformat()}


BEFORE = usage("before", 5, 5)
LATER_IN_ITS_HOUR = usage("later in its hour", 5, 2)
SENT = usage("sent", 4, 7)
LATE_AND_NOT_SENT = usage("late and not sent", 4, 1)
NOT_SENT = usage("not sent", 3, 3)
SENT_AND_NOT_REPEATED = usage("sent and not repeated", 2, 4)


@pytest.fixture
def postgres(tmp_path: Path) -> Iterator[EmbeddedPostgres]:
    # Not durable: no machine fails here, and a disk that is busy with a restore makes Redis wait for it.
    started = EmbeddedPostgres(tmp_path / "postgres", durable=False)
    started.start()
    try:
        yield started
    finally:
        started.stop()


@pytest.fixture
async def own(postgres: EmbeddedPostgres, servers: Servers, fake_stripe: FakeStripe) -> AsyncIterator[Resources]:
    settings = make_settings(
        database_url=postgres.url, redis_url=servers.valkey.url, stripe_api_base=fake_stripe.url, database_pool_size=5
    )
    async with open_resources(settings, application_name="tests") as opened:
        await opened.redis.flushdb()
        await schema.migrate(opened.engine)
        async with db.transaction(opened.engine) as connection:
            await make_partitions(connection, NOW)
        yield opened
        await opened.redis.flushdb()


async def postgres_tool(postgres: EmbeddedPostgres, *command: str) -> None:
    """One of PostgreSQL's own programs, as an operator calls it."""
    program = postgres._programs / command[0]
    environment = {
        "PATH": os.environ["PATH"],
        "PGHOST": "127.0.0.1",
        "PGPORT": str(postgres.port),
        "PGUSER": "postgres",
    }
    await asyncio.to_thread(lambda: subprocess.run([program, *command[1:]], env=environment, check=True))


async def post(client: httpx.AsyncClient, *events: dict[str, Any]) -> tuple[int, int]:
    """How many were accepted, and how many were duplicates."""
    answer = (await client.post("/v1/usage", json=list(events))).raise_for_status().json()
    assert answer["rejected"] == []
    return answer["accepted"], answer["duplicates"]


async def flush(resources: Resources) -> None:
    await drain(resources, datetime.now(UTC))
    await seal_everything(resources, datetime.now(UTC))
    await deliver_all(resources, datetime.now(UTC))


async def reconcile(resources: Resources, at: datetime) -> list[tuple[object, ...]]:
    """`tallystick reconcile --stripe` at that time; what differs, with our number and Stripe's."""
    async with db.transaction(resources.engine) as connection:
        pairs = await find_pairs(connection, dict.fromkeys(("customer", "meter", "from", "to")))
    for pair in pairs:
        await compare_now(resources, pair, at)
    return await read_all(resources, DRIFTS)


async def at_stripe(stripe: FakeStripe, meter: str, customer: str) -> dict[int, Decimal]:
    """What Stripe bills, by hours ago."""
    page = await stripe.client.v1.billing.meters.event_summaries.list_async(
        meter,
        {
            "customer": customer,
            "start_time": int((HOUR - timedelta(hours=6)).timestamp()),
            "end_time": int((HOUR + timedelta(hours=1)).timestamp()),
            "value_grouping_window": "hour",
        },
    )
    return {
        int((HOUR.timestamp() - each.start_time) // 3600): Decimal(str(each.aggregated_value)) for each in page.data
    }


def documented_ids(project_root: Path) -> str:
    """The keys that the page on operations tells to forget."""
    page = (project_root / "docs" / "operations.md").read_text()
    found = re.search(r"--scan --pattern '(\S+)' \| xargs", page)
    assert found
    return found[1]


async def test_a_restored_database_comes_out_right_and_nothing_is_doubled(
    own: Resources, postgres: EmbeddedPostgres, shop: Shop, fake_stripe: FakeStripe, tmp_path: Path, project_root: Path
) -> None:
    meter = await fake_stripe.client.v1.billing.meters.create_async(
        {"display_name": "m", "event_name": METER, "default_aggregation": {"formula": "sum"}}
    )
    await refresh_meters(own, datetime.now(UTC))
    async with db.transaction(own.engine) as connection:
        key = await create_key(connection, name="tests", source="tests", scopes=list(SCOPES))

    async with receiving(shop, own) as client:
        client.headers["Authorization"] = f"Bearer {key}"
        acme, subscription = await shop.sign_up("acme")
        await shop.settle()
        assert await post(client, BEFORE) == (1, 0)
        await flush(own)
        await recover(own, datetime.now(UTC))

        dump = tmp_path / "tallystick.dump"
        await postgres_tool(postgres, "pg_dump", "--format=custom", f"--file={dump}", "tallystick")

        # Life goes on, at Stripe and in Redis too.
        assert await post(client, LATER_IN_ITS_HOUR, SENT, SENT_AND_NOT_REPEATED) == (3, 0)
        await flush(own)
        assert await post(client, NOT_SENT, LATE_AND_NOT_SENT) == (2, 0)
        await drain(own, datetime.now(UTC))
        await shop.cancel(subscription)
        await shop.sign_up("newcomer")
        await shop.settle()
        assert await access_of(own, "acme") == ("none", "ended")
        billed = {2: Decimal(4), 4: Decimal(7), 5: Decimal(7)}
        assert await at_stripe(fake_stripe, meter.id, acme) == billed

        # The disk is lost, and the dump is what there is.
        await own.engine.dispose()
        await postgres_tool(postgres, "dropdb", "--force", "tallystick")
        await postgres_tool(postgres, "createdb", "tallystick")
        await postgres_tool(postgres, "pg_restore", "--exit-on-error", "--no-owner", "--dbname=tallystick", str(dump))
        await schema.migrate(own.engine)
        assert await access_of(own, "acme") == ("active", "subscription_active")
        assert await access_of(own, "newcomer") is None

        # Redis knows ids that the ledger has lost. When they are forgotten, what is sent again is taken again.
        again = (BEFORE, LATER_IN_ITS_HOUR, SENT, LATE_AND_NOT_SENT, NOT_SENT)
        assert await post(client, *again) == (0, 5)
        async for name in own.redis.scan_iter(match=documented_ids(project_root)):
            await own.redis.unlink(name)
        assert await post(client, *again) == (5, 0)

        await recover(own, datetime.now(UTC))
        await refresh_all(own)
        assert await access_of(own, "acme") == ("none", "ended")
        assert await access_of(own, "newcomer") == ("active", "subscription_active")
        assert await differing(own) == []

        # Nothing is doubled; what had not been sent is sent, if Stripe had nothing else under its identifier.
        await flush(own)
        assert (await conservation(own)).accepted == 5 + 2 + 7 + 1 + 3
        assert await at_stripe(fake_stripe, meter.id, acme) == billed | {3: Decimal(3)}

        # What nobody repeats is known to Stripe only. It comes into view with the next delivery, and goes when it is
        # sent again.
        assert await post(client, usage("after", 0, 1)) == (1, 0)
        await flush(own)
        lost = (HOUR - timedelta(hours=2), 0, 4)
        assert await reconcile(own, datetime.now(UTC)) == [lost]
        assert await post(client, SENT_AND_NOT_REPEATED) == (1, 0)
        await flush(own)
        assert await reconcile(own, datetime.now(UTC)) == []

        # The event that shares its identifier with one that Stripe had is missing there. A day later that is a drift,
        # and telling Stripe the difference mends it.
        missing = (HOUR - timedelta(hours=4), 8, 7)
        assert await reconcile(own, datetime.now(UTC) + LAG) == [missing]
        await fake_stripe.client.v1.billing.meter_events.create_async(
            {
                "event_name": METER,
                "payload": {"stripe_customer_id": acme, "value": "1"},
                "timestamp": int(missing[0].timestamp()),
            }
        )
        assert await reconcile(own, datetime.now(UTC) + LAG) == []
        assert sum((await at_stripe(fake_stripe, meter.id, acme)).values()) == 5 + 2 + 7 + 1 + 3 + 4 + 1
        assert (await conservation(own)).confirmed == 5 + 2 + 7 + 1 + 3 + 4 + 1
