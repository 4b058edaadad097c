"""The doctor says of each part that it is good, or how to mend it."""

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from tallystick import db, loops
from tallystick.dev.embedded import EmbeddedPostgres
from tallystick.doctor import examine
from tallystick.findings import Finding
from tallystick.loops import LAST_DONE, Loop, read_last_done, run_loops
from tallystick.resources import Resources
from tallystick.usage.ledger import record_events
from tallystick.webhooks.endpoint_setup import set_up_endpoint
from tallystick.webhooks.recovery import recover
from tallystick.worker import LOOPS
from tests.conftest import Servers
from tests.notifications.receiving import SECRET
from tests.recovery.shop import Shop
from tests.usage.making import make_event
from tests.waiting import wait_until

URL = "https://billing.example.com/webhooks/stripe"


def environment(servers: Servers, stripe_url: str) -> dict[str, str]:
    return {
        "DATABASE_URL": servers.postgres.url,
        "REDIS_URL": servers.valkey.url,
        "STRIPE_API_KEY": "sk_test_for_tests",
        "STRIPE_WEBHOOK_SECRET": "whsec_for_tests",
        "STRIPE_API_BASE": stripe_url,
    }


@pytest.fixture
async def healthy(
    shop: Shop, resources: Resources, servers: Servers, fake_stripe_url: str, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Resources]:
    """All that a service needs, but for what the tests' servers leave out on purpose: to wait for the disk."""
    for name, value in environment(servers, fake_stripe_url).items():
        monkeypatch.setenv(name, value)
    await shop.stripe.client.v1.billing.meters.create_async(
        {"display_name": "Calls", "event_name": "calls", "default_aggregation": {"formula": "sum"}}
    )
    await set_up_endpoint(resources, URL)
    customer = await shop.stripe.client.v1.customers.create_async()
    # The fake Stripe makes the portal's default configuration when it is first needed.
    await shop.stripe.client.v1.billing_portal.sessions.create_async({"customer": customer.id})
    await recover(resources, datetime.now(UTC))
    await note_runs(resources, datetime.now(UTC), *(loop.name for loop in LOOPS))
    before: Any = await resources.redis.config_get("appendfsync")
    await resources.redis.config_set("appendfsync", "everysec")
    yield resources
    await resources.redis.config_set("appendfsync", before["appendfsync"])
    await resources.redis.config_set("maxmemory-policy", "noeviction")


async def findings(**options: object) -> dict[str, Finding]:
    return {finding.part: finding for finding in await examine(**options)}  # type: ignore[arg-type]


async def wrong() -> dict[str, str]:
    """What is wrong, but for the disk of the tests' PostgreSQL."""
    found = await findings()
    return {part: one.text for part, one in found.items() if not one.good and part != "PostgreSQL's disk"}


async def note_runs(resources: Resources, at: datetime, *loops: str) -> None:
    await resources.redis.hset(LAST_DONE, mapping=dict.fromkeys(loops, int(at.timestamp())))


async def change(resources: Resources, statement: str) -> None:
    async with db.transaction(resources.engine) as connection:
        await connection.execute(text(statement))


async def test_everything_that_is_good_is_said_to_be_good(healthy: Resources) -> None:
    found = await findings()

    assert [part for part, finding in found.items() if not finding.good] == ["PostgreSQL's disk"]
    assert list(found) == [
        "settings",
        "rules file",
        "PostgreSQL",
        "schema",
        "PostgreSQL's disk",
        "PostgreSQL's clock",
        "Redis",
        "Redis's disk",
        "Redis's memory",
        "usage ids",
        "Redis's clock",
        "Stripe",
        "Stripe's clock",
        "webhook endpoint",
        "meters",
        "portal",
        "events",
        "quarantine",
        "usage",
        "worker",
    ]
    assert found["webhook endpoint"].text.startswith(f"{URL}; whether STRIPE_WEBHOOK_SECRET is its secret")
    assert "in use; `maxmemory` is not set; nothing is evicted" in found["Redis's memory"].text
    assert found["Stripe"].text == "the key works, in test mode"


async def test_a_durable_postgres_is_good_and_an_empty_one_wants_its_migrations(
    healthy: Resources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    postgres = EmbeddedPostgres(tmp_path / "postgres")
    postgres.start()
    try:
        monkeypatch.setenv("DATABASE_URL", postgres.url)
        found = await findings()
    finally:
        postgres.stop()

    assert found["PostgreSQL's disk"].good
    assert "tallystick migrate" in found["schema"].text
    # What is in the tables cannot be asked yet.
    assert "events" not in found


async def test_settings_that_are_missing_are_named(healthy: Resources, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STRIPE_API_KEY")

    [finding] = await examine()

    assert (finding.part, finding.good) == ("settings", False)
    assert "STRIPE_API_KEY is not set" in finding.text


async def test_a_webhook_secret_that_is_missing_hides_nothing_else(
    healthy: Resources, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("STRIPE_WEBHOOK_SECRET")

    assert list(await wrong()) == ["settings"]
    assert "tallystick webhooks setup --url" in (await wrong())["settings"]


async def test_a_wrong_rules_file_is_named_and_hides_nothing_else(
    healthy: Resources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rules = tmp_path / "rules.toml"
    rules.write_text("[access]\ngrace_days = -1\n")
    monkeypatch.setenv("TALLYSTICK_RULES_FILE", str(rules))

    assert list(await wrong()) == ["rules file"]
    assert "access.grace_days" in (await wrong())["rules file"]


@pytest.mark.parametrize(
    ("name", "value", "part", "word"),
    [
        ("DATABASE_URL", "postgresql://127.0.0.1:1/none", "PostgreSQL", "connection refused; is DATABASE_URL right"),
        ("REDIS_URL", "redis://127.0.0.1:1/0", "Redis", "connection refused; is REDIS_URL right"),
        ("STRIPE_API_BASE", "http://127.0.0.1:1", "Stripe", "connection refused; can http://127.0.0.1:1 be reached"),
        ("STRIPE_API_KEY", "wrong", "Stripe", "STRIPE_API_KEY"),
    ],
)
async def test_a_part_that_is_away_is_named(
    healthy: Resources, monkeypatch: pytest.MonkeyPatch, name: str, value: str, part: str, word: str
) -> None:
    monkeypatch.setenv(name, value)

    found = await wrong()

    assert list(found) == [part]
    assert word in found[part]


@pytest.mark.parametrize(
    ("name", "value", "part"),
    [("appendfsync", "no", "Redis's disk"), ("maxmemory-policy", "allkeys-lru", "Redis's memory")],
)
async def test_redis_must_keep_what_it_is_given(healthy: Resources, name: str, value: str, part: str) -> None:
    await healthy.redis.config_set(name, value)

    found = await wrong()

    assert list(found) == [part]
    assert name in found[part]


async def test_the_endpoint_must_have_the_handled_types(healthy: Resources, shop: Shop) -> None:
    services = shop.stripe.client.v1.webhook_endpoints
    [endpoint] = (await services.list_async()).data
    await services.update_async(endpoint.id, {"enabled_events": ["customer.created"]})
    assert "event types" in (await wrong())["webhook endpoint"]

    await services.delete_async(endpoint.id)
    assert "tallystick webhooks setup" in (await wrong())["webhook endpoint"]


async def test_each_endpoint_is_good_or_wrong_by_itself(healthy: Resources, shop: Shop) -> None:
    disabled = "https://other.example.com/webhooks/stripe"
    made = await set_up_endpoint(healthy, disabled)
    await shop.stripe.client.v1.webhook_endpoints.update_async(made.id, {"disabled": True})

    lines = [finding for finding in await examine() if finding.part == "webhook endpoint"]

    assert [(line.good, line.text.partition(" ")[0]) for line in lines] == [(False, f"{disabled}:"), (True, f"{URL};")]
    assert f"it is disabled: tallystick webhooks setup --url {disabled}" in lines[0].text


async def test_a_meter_is_needed_and_must_be_one_that_can_be_used(healthy: Resources, shop: Shop) -> None:
    services = shop.stripe.client.v1.billing.meters
    await services.create_async(
        {
            "display_name": "Seats",
            "event_name": "seats",
            "default_aggregation": {"formula": "sum"},
            "event_time_window": "day",
        }
    )
    assert await wrong() == {}

    [sum_meter] = [meter for meter in (await services.list_async()).data if meter.event_name == "calls"]
    await services.deactivate_async(sum_meter.id)
    assert "seats" in (await wrong())["meters"]


async def test_a_clock_that_is_wrong_is_found_by_all_three(healthy: Resources) -> None:
    for ahead in (timedelta(minutes=2), timedelta(minutes=-2)):
        found = await findings(clock=lambda ahead=ahead: datetime.now(UTC) + ahead)
        for part in ("PostgreSQL's clock", "Redis's clock", "Stripe's clock"):
            assert not found[part].good
            assert "NTP" in found[part].text


async def test_a_portal_without_a_default_configuration_is_found(healthy: Resources, shop: Shop) -> None:
    services = shop.stripe.client.v1.billing_portal.configurations
    [default] = (await services.list_async({"is_default": True})).data
    await services.update_async(default.id, {"active": False})
    assert "Dashboard" in (await wrong())["portal"]


async def test_redis_must_have_room_for_the_usage_that_may_wait(
    healthy: Resources, monkeypatch: pytest.MonkeyPatch
) -> None:
    await healthy.redis.setrange("filler", 8 * 2**20, "x")
    used = int((await healthy.redis.info("memory"))["used_memory"])
    monkeypatch.setenv("TALLYSTICK_USAGE_BUFFER_MAX_BYTES", str(2**20))
    try:
        await healthy.redis.config_set("maxmemory", int(used * 1.2))
        assert "raise" in (await wrong())["Redis's memory"]
        monkeypatch.setenv("TALLYSTICK_USAGE_BUFFER_MAX_BYTES", str(2**30))
        await healthy.redis.config_set("maxmemory", 2**29)
        assert "TALLYSTICK_USAGE_BUFFER_MAX_BYTES" in (await wrong())["Redis's memory"]
    finally:
        await healthy.redis.config_set("maxmemory", 0)


async def test_a_worker_that_is_away_and_a_loop_that_only_fails_are_found(healthy: Resources) -> None:
    await note_runs(healthy, datetime.now(UTC) - timedelta(minutes=3), "drain", "conservation")
    assert await wrong() == {"worker": "no run without an error lately of drain: see `loop_failed` in its log"}

    await healthy.redis.delete(LAST_DONE)
    assert "start `tallystick worker`" in (await wrong())["worker"]


async def test_the_loops_note_when_they_last_ended_well(healthy: Resources, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loops, "NOTE_EVERY_SECONDS", 0.01)
    await healthy.redis.delete(LAST_DONE)
    stop = asyncio.Event()

    async def work(resources: Resources, now: datetime) -> int:
        return 0

    async def fail(resources: Resources, now: datetime) -> int:
        raise OSError

    async def noted() -> bool:
        return bool(await read_last_done(healthy.redis))

    running = asyncio.create_task(run_loops(healthy, [Loop("works", 60, work), Loop("fails", 60, fail)], stop))
    await wait_until(noted)
    stop.set()
    await running

    [(name, at)] = (await read_last_done(healthy.redis)).items()
    assert name == "works"
    assert datetime.now(UTC) - at < timedelta(minutes=1)


async def test_receivers_of_notifications_must_let_us_connect(
    healthy: Resources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake_stripe_url: str
) -> None:
    rules = tmp_path / "rules.toml"
    receivers = {"up": fake_stripe_url, "down": "http://127.0.0.1:1"}
    entry = '[[notifications]]\nname = "{}"\nurl = "{}"\nallow_private_network = true\nsecrets = ["{}"]\n'
    rules.write_text("".join(entry.format(name, url, SECRET) for name, url in receivers.items()))
    monkeypatch.setenv("TALLYSTICK_RULES_FILE", str(rules))
    assert list(await wrong()) == ["receiver down"]
    assert (await findings())["receiver up"].good

    rules.write_text(f'[[notifications]]\nname = "inside"\nurl = "https://localhost/hooks"\nsecrets = ["{SECRET}"]\n')
    assert "allow_private_network" in (await wrong())["receiver inside"]


async def test_events_must_be_complete(healthy: Resources) -> None:
    await change(healthy, "UPDATE event_recovery SET complete_until = now() - interval '1 day'")
    assert "worker" in (await wrong())["events"]
    await change(healthy, "UPDATE event_recovery SET complete_until = now(), gap_from = now(), gap_until = now()")
    assert "tallystick sync" in (await wrong())["events"]
    await change(healthy, "DELETE FROM event_recovery")
    assert "tallystick recover" in (await wrong())["events"]


async def test_events_in_quarantine_and_an_unfinished_sync_are_told(healthy: Resources) -> None:
    await change(healthy, "UPDATE stripe_events SET verdict = 'quarantined' WHERE type = 'price.created'")
    await change(healthy, "INSERT INTO mirror_sync (all_invoices, started_at) VALUES (false, now())")

    found = await wrong()

    assert list(found) == ["quarantine", "sync"]
    assert found["quarantine"].startswith("1 event")


async def test_usage_that_belongs_to_no_customer_is_worth_a_look_and_wrong_before_it_is_too_old(
    healthy: Resources,
) -> None:
    now = datetime.now(UTC)
    async with db.transaction(healthy.engine) as connection:
        events = [
            make_event("e1", customer_ref="acmee", at=now - timedelta(days=20)),
            make_event("e2", customer_ref="a", at=now),
        ]
        await record_events(connection, events, accepted_already=True)
    (usage,) = [finding for finding in await examine() if finding.part == "usage"]
    assert (usage.good, usage.notable) == (True, True)
    hour = f"{now - timedelta(days=20):%Y-%m-%d %H}:00 UTC"
    told = f"2 references have usage that belongs to no customer; the oldest, of 'acmee', is from {hour},"
    assert usage.text.startswith(told)
    assert await wrong() == {}

    await change(healthy, "UPDATE usage_totals SET bucket_start = bucket_start - interval '1 day'")
    assert list(await wrong()) == ["usage"]
