"""What changes access without an event: grace that runs out, and rules that change."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from structlog.testing import capture_logs
from typer.testing import CliRunner

from tallystick import cli, db
from tallystick.access import upkeep
from tallystick.access.state import recompute_access
from tallystick.access.upkeep import (
    RULES_HELD_FOR,
    OtherRulesHold,
    Recomputed,
    expire_grace,
    follow_rules,
    recompute_everybody,
)
from tallystick.app import create_app
from tallystick.resources import Resources, open_resources
from tests.conftest import open_client
from tests.webhooks.stripe_events import NOON, deliver, event, invoice, item, read, subscription

DAY = timedelta(days=1)


@pytest.fixture
def rules_file(tmp_path: Path) -> Path:
    path = tmp_path / "rules.toml"
    write_rules(path, "grace_days = 3")
    return path


def write_rules(path: Path, *lines: str) -> None:
    # Another time of change for sure, whatever the resolution of the file system's clock.
    before = path.stat().st_mtime_ns if path.exists() else 0
    path.write_text("\n".join(["[access]", *lines]))
    while path.stat().st_mtime_ns == before:
        path.touch()


@asynccontextmanager
async def open_process(resources: Resources, rules_file: Path) -> AsyncIterator[Resources]:
    """What another process with this rules file has open."""
    settings = resources.settings.model_copy(update={"rules_file": rules_file})
    async with open_resources(settings, application_name="tests") as opened:
        yield opened


@pytest.fixture
async def ruled(resources: Resources, rules_file: Path) -> AsyncIterator[Resources]:
    """The worker's resources."""
    async with open_process(resources, rules_file) as opened:
        yield opened


@pytest.fixture
async def api(resources: Resources, rules_file: Path, api_key: str) -> AsyncIterator[httpx.AsyncClient]:
    """A client of an application that has the rules file."""
    app = create_app(resources.settings.model_copy(update={"rules_file": rules_file}))
    async with app.router.lifespan_context(app), open_client(app, api_key) as client:
        yield client


async def ask(client: httpx.AsyncClient, customer: str = "cus_1") -> dict[str, Any]:
    answer = await client.get(f"/v1/customers/{customer}/access")
    return dict(answer.json()) | {"etag": answer.headers["etag"]}


def a_day_ago() -> int:
    """As seconds after noon: late enough for a grace that has not ended yet."""
    return int((datetime.now(UTC) - DAY).timestamp()) - NOON


async def test_grace_ends_by_itself(api: httpx.AsyncClient, ruled: Resources) -> None:
    at = a_day_ago()
    failed = event("invoice.payment_failed", invoice(), at=at)
    await deliver(api, event("customer.subscription.created", subscription(), at=at - 1), failed)
    began = await ask(api)
    until = datetime.fromtimestamp(NOON + at, UTC) + 3 * DAY
    assert (began["access"], began["reason"], began["decided_by"]) == ("grace", "payment_failed", failed["id"])
    assert datetime.fromisoformat(began["until"]) == until
    assert began["prices"] == ["price_1"]

    assert await expire_grace(ruled, until - timedelta(microseconds=1)) == 0
    assert await ask(api) == began

    assert await expire_grace(ruled, until) == 1
    ended = await ask(api)
    assert (ended["access"], ended["reason"], ended["until"]) == ("restricted", "payment_failed", None)
    assert (ended["decided_by"], ended["prices"]) == (failed["id"], [])
    assert datetime.fromisoformat(ended["since"]) == until
    assert await expire_grace(ruled, until + DAY) == 0

    [last, *_] = (await api.get("/v1/customers/cus_1/timeline")).json()["lines"]
    assert (last["old"], last["new"], last["cause"]) == ("grace", "restricted", "grace")
    assert last["event"]["id"] == failed["id"]


async def test_a_payment_ends_the_watch_over_grace(api: httpx.AsyncClient, ruled: Resources) -> None:
    at = a_day_ago()
    await deliver(
        api,
        event("customer.subscription.created", subscription(), at=at - 1),
        event("invoice.payment_failed", invoice(), at=at),
        event("invoice.paid", invoice(status="paid"), at=at + 1),
    )

    assert (await ask(api))["access"] == "active"
    assert await expire_grace(ruled, datetime.now(UTC) + 30 * DAY) == 0


async def test_the_grace_of_one_of_several_subscriptions_ends_too(api: httpx.AsyncClient, ruled: Resources) -> None:
    at = a_day_ago()
    second = subscription("sub_2", items=[item("si_2", "price_2")])
    await deliver(
        api,
        event("customer.subscription.created", subscription(), at=at - 1),
        event("customer.subscription.created", second, at=at - 1),
        event("invoice.payment_failed", invoice(), at=at),
    )
    during = await ask(api)
    assert (during["access"], during["until"], during["prices"]) == ("active", None, ["price_1", "price_2"])

    assert await expire_grace(ruled, datetime.now(UTC) + 3 * DAY) == 1

    after = await ask(api)
    assert (after["access"], after["prices"], after["since"]) == ("active", ["price_2"], during["since"])


async def test_an_overdue_invoice_has_grace_from_its_due_date_though_it_is_not_the_latest(
    api: httpx.AsyncClient,
) -> None:
    at = a_day_ago()
    due = invoice("in_1", due_date=NOON + at, collection_method="send_invoice")
    latest = invoice("in_2", due_date=NOON + at + 30 * 86_400, collection_method="send_invoice")
    await deliver(
        api,
        event("invoice.updated", due, at=at),
        event("invoice.updated", latest, at=at),
        event("customer.subscription.updated", subscription(status="past_due", latest_invoice="in_2"), at=at),
    )

    answer = await ask(api)
    assert (answer["access"], answer["reason"]) == ("grace", "past_due")
    assert datetime.fromisoformat(answer["until"]) == datetime.fromtimestamp(NOON + at, UTC) + 3 * DAY


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
async def test_further_failed_tries_do_not_lengthen_grace(api: httpx.AsyncClient, order: tuple[int, ...]) -> None:
    at = a_day_ago()
    await deliver(api, event("customer.subscription.created", subscription(), at=at - 1))
    tries = [event("invoice.payment_failed", invoice(), at=at + number * 3600) for number in range(3)]

    await deliver(api, *(tries[number] for number in order))

    assert datetime.fromisoformat((await ask(api))["until"]) == datetime.fromtimestamp(NOON + at, UTC) + 3 * DAY


async def test_the_tries_of_one_batch_count_from_the_first(api: httpx.AsyncClient, resources: Resources) -> None:
    at = a_day_ago()
    tries = [event("invoice.payment_failed", invoice(), at=at + number * 3600) for number in (1, 0, 2)]

    await asyncio.gather(*(deliver(api, one) for one in tries))

    [row] = await read(resources, "SELECT payment_failing_since AS first, payment_failed_at AS last FROM invoices")
    assert (row["first"], row["last"] - row["first"]) == (
        datetime.fromtimestamp(NOON + at, UTC),
        timedelta(hours=2),
    )


async def fill(resources: Resources, customers: int) -> None:
    """Customers, each with a subscription that is past due, decided by nobody's rules yet."""
    async with db.transaction(resources.engine) as connection:
        for statement in (
            f"INSERT INTO customers (id) SELECT 'cus_' || n FROM generate_series(1, {customers}) n",  # noqa: S608
            "INSERT INTO subscriptions (id, customer, status) SELECT 'sub_' || id, id, 'past_due' FROM customers",
            "INSERT INTO customer_access SELECT id, 'none', 'no_subscription', now() FROM customers",
        ):
            await connection.exec_driver_sql(statement)


async def count_accesses(resources: Resources) -> dict[str, int]:
    rows = await read(resources, "SELECT access, count(*) AS customers FROM customer_access GROUP BY access")
    return {row["access"]: row["customers"] for row in rows}


async def test_changed_rules_reach_everybody_in_batches(
    ruled: Resources, rules_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upkeep, "CUSTOMERS_PER_TRANSACTION", 7)
    await fill(ruled, 24)
    now = datetime.now(UTC)
    assert await follow_rules(ruled, now) == 24
    assert await count_accesses(ruled) == {"restricted": 24}
    assert await follow_rules(ruled, now) == 0

    write_rules(rules_file, 'past_due = "none"')
    assert await follow_rules(ruled, now + timedelta(seconds=1)) == 0  # it was looked at a second ago
    assert await follow_rules(ruled, now + timedelta(seconds=6)) == 24
    assert await count_accesses(ruled) == {"none": 24}
    [line] = await read(ruled, "SELECT * FROM customer_timeline WHERE customer = 'cus_7' AND old = 'restricted'")
    assert (line["new"], line["reason"], line["cause"], line["event"]) == ("none", "past_due", "rules", None)


async def test_a_run_is_bounded_and_the_next_one_goes_on(ruled: Resources, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upkeep, "CUSTOMERS_PER_TRANSACTION", 5)
    monkeypatch.setattr(upkeep, "BATCHES_PER_RUN", 2)
    await fill(ruled, 24)

    runs = [await follow_rules(ruled, datetime.now(UTC)) for _ in range(4)]

    assert runs == [10, 10, 4, 0]


async def test_two_workers_at_once_do_no_harm(ruled: Resources, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upkeep, "CUSTOMERS_PER_TRANSACTION", 5)
    await fill(ruled, 24)
    now = datetime.now(UTC)

    await asyncio.gather(follow_rules(ruled, now), follow_rules(ruled, now), expire_grace(ruled, now))

    assert await count_accesses(ruled) == {"restricted": 24}
    assert len(await read(ruled, "SELECT id FROM customer_timeline")) == 24


async def test_two_workers_with_other_rules_do_not_undo_each_others_decisions(
    resources: Resources, tmp_path: Path
) -> None:
    await fill(resources, 3)
    older, newer = tmp_path / "older.toml", tmp_path / "newer.toml"
    write_rules(older, 'past_due = "grace"')
    write_rules(newer, 'past_due = "none"')
    now = datetime.now(UTC)
    async with open_process(resources, older) as first, open_process(resources, newer) as second:
        assert await follow_rules(first, now) == 3
        assert await follow_rules(second, now) == 3
        for _ in range(2):
            with pytest.raises(OtherRulesHold):
                await follow_rules(first, now)
            assert await follow_rules(second, now) == 0
        told = "SELECT data ->> 'access' AS access FROM notifications WHERE customer = 'cus_1' AND type = :type"
        rows = await read(resources, told, type="access.changed")
        assert [row["access"] for row in rows] == ["grace", "none"]

        # The changed file reaches the first one's machine, too.
        write_rules(older, 'past_due = "none"')
        assert await follow_rules(first, now + timedelta(seconds=6)) == 0
        # It is taken back there, and the second one's machine is told last.
        write_rules(older, 'past_due = "grace"')
        assert await follow_rules(first, now + timedelta(seconds=12)) == 3
        with pytest.raises(OtherRulesHold):
            await follow_rules(second, now + timedelta(seconds=12))
        # It is not told at all, and the first one is switched off.
        assert await follow_rules(second, now + timedelta(seconds=12) + RULES_HELD_FOR) == 3


async def test_what_a_process_with_the_old_rules_writes_is_decided_again(
    api: httpx.AsyncClient, ruled: Resources, rules_file: Path
) -> None:
    await deliver(api, event("customer.subscription.created", subscription(status="paused")))
    write_rules(rules_file, 'paused = "grace"')
    now = datetime.now(UTC)
    assert await follow_rules(ruled, now) == 1
    assert (await ask(api))["access"] == "grace"

    # The API looked at the file less than five seconds ago, and still has the old rules.
    await deliver(api, event("customer.subscription.updated", subscription(status="paused"), at=1))
    assert (await ask(api))["access"] == "restricted"

    assert await follow_rules(ruled, now) == 1
    assert (await ask(api))["access"] == "grace"


async def test_rules_that_change_nothing_for_a_customer_leave_its_answer_as_it_was(
    api: httpx.AsyncClient, ruled: Resources, rules_file: Path
) -> None:
    await deliver(api, event("customer.subscription.created", subscription()))
    before = await ask(api)

    write_rules(rules_file, 'paused = "none"')
    assert await follow_rules(ruled, datetime.now(UTC)) == 1

    assert await ask(api) == before
    assert await follow_rules(ruled, datetime.now(UTC)) == 0
    assert len((await api.get("/v1/customers/cus_1/timeline")).json()["lines"]) == 2


async def test_an_invoice_from_the_end_of_time_has_grace_until_then(api: httpx.AsyncClient, ruled: Resources) -> None:
    last_second = 253_402_300_799
    past_due = subscription(status="past_due", latest_invoice="in_1")
    made = event("invoice.created", invoice(created=last_second))
    await deliver(api, event("customer.subscription.created", past_due), made)

    answer = await ask(api)

    assert (answer["access"], answer["until"]) == ("grace", "9999-12-31T23:59:59.999999Z")
    assert await recompute_everybody(ruled, datetime.now(UTC)) == Recomputed(1, 0)


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Customers on whom our own handling fails."""
    customers = {"cus_1", "cus_15"}

    async def recompute(connection: Any, decided_by: dict[str, None], *arguments: Any, **options: Any) -> set[str]:
        if customers & decided_by.keys():
            raise OverflowError
        return await recompute_access(connection, decided_by, *arguments, **options)

    monkeypatch.setattr(upkeep, "recompute_access", recompute)
    return customers


async def test_a_customer_that_cannot_be_decided_keeps_no_other_waiting(
    ruled: Resources, broken: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upkeep, "CUSTOMERS_PER_TRANSACTION", 5)
    await fill(ruled, 24)
    with capture_logs() as logs:
        assert await follow_rules(ruled, datetime.now(UTC)) == 22
    assert await count_accesses(ruled) == {"restricted": 22, "none": 2}
    assert {line["customer"] for line in logs if line["event"] == "access_not_decided"} == broken

    async with db.transaction(ruled.engine) as connection:
        await connection.exec_driver_sql("UPDATE customer_access SET decide_again_at = now()")
    assert await expire_grace(ruled, datetime.now(UTC)) == 22
    assert (await recompute_everybody(ruled, datetime.now(UTC))).customers == 22

    broken.clear()
    assert await follow_rules(ruled, datetime.now(UTC)) == 2
    assert await count_accesses(ruled) == {"restricted": 24}


async def test_a_run_fails_when_nobody_can_be_decided(
    ruled: Resources, broken: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upkeep, "CUSTOMERS_PER_TRANSACTION", 5)
    await fill(ruled, 12)
    broken |= {f"cus_{number}" for number in range(1, 13)}
    with pytest.raises(upkeep.TooManyFailures):
        await follow_rules(ruled, datetime.now(UTC))


@pytest.mark.parametrize("statement", [upkeep.FIND_ENDED, upkeep.FIND_DECIDED_OTHERWISE], ids=["grace", "rules"])
async def test_what_is_due_is_found_by_an_index(resources: Resources, statement: Any) -> None:
    await fill(resources, 10_000)
    async with db.transaction(resources.engine) as connection:
        await connection.exec_driver_sql("UPDATE customer_access SET rules = 'current'")
        await connection.exec_driver_sql("ANALYZE customer_access")
        parameters = {":passed": "'{cus_1}'", ":now": "now()", ":rules": "'current'", ":limit": "200"}
        query = statement.text
        for name, value in parameters.items():
            query = query.replace(name, value)
        plan = "\n".join([line for (line,) in await connection.exec_driver_sql(f"EXPLAIN {query}")])
        await connection.rollback()
    assert "Seq Scan" not in plan, plan


async def test_everybody_is_decided_anew(ruled: Resources, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upkeep, "CUSTOMERS_PER_TRANSACTION", 10)
    await fill(ruled, 24)
    async with db.transaction(ruled.engine) as connection:
        # Rows that something has spoilt, and one that is missing.
        await connection.exec_driver_sql("DELETE FROM customer_access WHERE customer = 'cus_3'")
    reported: list[int] = []

    done = await recompute_everybody(ruled, datetime.now(UTC), reported.append)

    assert (done.customers, done.changed, reported) == (24, 24, [10, 20, 24])
    assert await count_accesses(ruled) == {"restricted": 24}
    again = await recompute_everybody(ruled, datetime.now(UTC))
    assert (again.customers, again.changed) == (24, 0)


async def test_the_command_decides_everybody_anew(
    ruled: Resources, rules_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await fill(ruled, 3)
    settings = ruled.settings
    for name, value in {
        "DATABASE_URL": settings.database_url.replace("+asyncpg", ""),
        "REDIS_URL": settings.redis_url,
        "STRIPE_API_KEY": "sk_test_for_tests",
        "STRIPE_WEBHOOK_SECRET": "whsec_for_tests",
        "TALLYSTICK_RULES_FILE": str(rules_file),
    }.items():
        monkeypatch.setenv(name, value)

    def run(*arguments: str) -> str:
        result = CliRunner().invoke(cli.app, ["access", "recompute", *arguments], catch_exceptions=False)
        assert result.exit_code == 0
        return result.stdout

    assert json.loads(await asyncio.to_thread(run, "--json")) == {"customers": 3, "changed": 3}
    assert await asyncio.to_thread(run) == "Decided 3 customers anew; 0 changed.\n"
    assert await count_accesses(ruled) == {"restricted": 3}
