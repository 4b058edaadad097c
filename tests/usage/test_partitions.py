"""The ledger's days: the next ones are there in time, and old ones go, whatever stands in the way of either."""

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, date, datetime, timedelta

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection
from structlog.testing import capture_logs

from tallystick import db
from tallystick.config import Settings
from tallystick.metrics import OVERDUE_PARTITIONS
from tallystick.resources import Resources, open_resources
from tallystick.usage import partitions
from tallystick.usage.conservation import count_conservation
from tallystick.usage.events import MAX_AGE, UsageEvent
from tallystick.usage.ledger import record_events
from tallystick.usage.partitions import DAYS_AHEAD, drop_partitions, keep_partitions, make_partitions
from tests.usage.making import conservation, last_hour, make_event, read_all, run
from tests.waiting import wait_until

# The days of the tests' ledger begin here.
OLDEST = timedelta(days=MAX_AGE.days + 1)


def name_of(day: date) -> str:
    return f"usage_events_{day:%Y%m%d}"


async def days_of(resources: Resources) -> set[str]:
    rows = await read_all(
        resources,
        "SELECT relname FROM pg_inherits JOIN pg_class ON oid = inhrelid WHERE inhparent = 'usage_events'::regclass",
    )
    return {str(name) for (name,) in rows}


async def record(resources: Resources, *events: UsageEvent) -> None:
    async with db.transaction(resources.engine) as connection:
        await record_events(connection, events, accepted_already=True)


def keeping(resources: Resources, days: int) -> Resources:
    settings = resources.settings.model_copy(update={"usage_retention_days": days})
    return dataclasses.replace(resources, settings=settings)


@pytest.fixture
async def forgetful(resources: Resources, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Resources]:
    """Resources whose ledger keeps all but its two oldest days; the days are made again afterwards."""
    monkeypatch.setattr(partitions, "DROP_PAUSE", timedelta(0))
    await keep_partitions(keeping(resources, OLDEST.days), datetime.now(UTC))  # other tests may have made older ones
    yield keeping(resources, OLDEST.days - 2)
    async with db.transaction(resources.engine) as connection:
        await make_partitions(connection, datetime.now(UTC))


@asynccontextmanager
async def reading_the_ledger(resources: Resources) -> AsyncIterator[AsyncConnection]:
    """A transaction that has read the whole ledger, as conservation does, and is not at its end."""
    async with resources.engine.connect() as reader:
        await count_conservation(reader)
        yield reader


async def test_dropped_days_leave_their_sums(forgetful: Resources) -> None:
    now = datetime.now(UTC)
    await record(forgetful, make_event("old", at=now - OLDEST, value="5"), make_event("new", at=last_hour()))
    assert await keep_partitions(forgetful, now) == 2
    assert await read_all(forgetful, "SELECT day, events FROM usage_retired WHERE events > 0") == [
        ((now - OLDEST).date(), 1)
    ]
    assert (await conservation(forgetful)).accepted == 6
    async with db.transaction(forgetful.engine) as connection:
        assert await make_partitions(connection, now) == 2
        assert await make_partitions(connection, now) == 0


async def test_whoever_reads_the_ledger_keeps_neither_the_next_days_nor_inserts_waiting(
    forgetful: Resources, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = datetime.now(UTC)
    last, old = name_of(now.date() + timedelta(days=DAYS_AHEAD)), name_of((now - OLDEST).date())
    await run(forgetful, f"DROP TABLE {last}")
    await record(forgetful, make_event("old", at=now - OLDEST))
    async with reading_the_ledger(forgetful):
        with capture_logs() as logs:
            await keep_partitions(forgetful, now)
        assert {last, old} < await days_of(forgetful)
        assert [line["event"] for line in logs] == ["partition_not_dropped"] * 2
        assert OVERDUE_PARTITIONS._value.get() == 2

        # One that tries for as long as the reader reads, so that an insert surely meets it.
        monkeypatch.setattr(partitions, "DROP_TRIES", 1_000_000)
        dropping = asyncio.create_task(keep_partitions(forgetful, now))
        locks = "SELECT count(*) FROM pg_locks WHERE relation = 'usage_events'::regclass AND NOT granted"

        async def is_waited_for() -> bool:
            return await read_all(forgetful, locks) == [(1,)]

        await wait_until(is_waited_for)
        async with db.transaction(forgetful.engine) as connection:
            await connection.execute(text("SET LOCAL lock_timeout = '1500ms'"))
            await record_events(connection, [make_event("new", at=last_hour())], accepted_already=True)
        assert not dropping.done()
    assert await dropping == 2
    assert old not in await days_of(forgetful)
    assert OVERDUE_PARTITIONS._value.get() == 0
    assert (await conservation(forgetful)).accepted == 2


async def test_a_day_that_cannot_be_dropped_holds_up_no_other(forgetful: Resources) -> None:
    fails, works = ((datetime.now(UTC) - OLDEST + timedelta(days=later)).date() for later in (0, 1))
    before = works + timedelta(days=1)
    await run(forgetful, "INSERT INTO usage_retired VALUES (:day, 0, 0)", day=fails)
    assert await drop_partitions(forgetful, before) == 1
    assert {name_of(fails), name_of(works)} & await days_of(forgetful) == {name_of(fails)}
    await run(forgetful, "DELETE FROM usage_retired WHERE day = :day", day=fails)
    assert await drop_partitions(forgetful, before) == 1


async def test_a_day_that_takes_long_to_add_up_is_dropped(
    forgetful: Resources, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(db, "STATEMENT_TIMEOUT_MS", 1000)
    monkeypatch.setattr(db, "COMMAND_TIMEOUT_SECONDS", 1)
    now = datetime.now(UTC)
    await run(
        forgetful,
        "CREATE FUNCTION take_long() RETURNS trigger LANGUAGE plpgsql"
        " AS 'BEGIN PERFORM pg_sleep(1.2); RETURN NEW; END'",
    )
    await run(forgetful, "CREATE TRIGGER slow BEFORE INSERT ON usage_retired FOR EACH ROW EXECUTE FUNCTION take_long()")
    try:
        async with open_resources(settings, application_name="tests") as hurried:
            assert await drop_partitions(hurried, (now - OLDEST).date() + timedelta(days=1)) == 1
    finally:
        await run(forgetful, "DROP FUNCTION take_long CASCADE")


async def test_workers_that_drop_at_once_drop_each_day_once(forgetful: Resources) -> None:
    now = datetime.now(UTC)
    before = (now - OLDEST).date() + timedelta(days=2)
    await record(forgetful, make_event("old", at=now - OLDEST))
    with capture_logs() as logs:
        assert sum(await asyncio.gather(*(drop_partitions(forgetful, before) for _ in range(3)))) == 2
    assert logs == []
    assert (await conservation(forgetful)).accepted == 1


async def test_stamps_of_dropped_days_are_deleted_however_many_there_are(
    forgetful: Resources, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(partitions, "STAMPS_PER_DELETE", 2)
    now = datetime.now(UTC)
    await run(
        forgetful,
        "INSERT INTO usage_stamps (source, id, day) SELECT 'tests', n::text, CAST(:old AS date) FROM"
        " generate_series(1, 5) n UNION ALL VALUES ('tests', 'new', CAST(:new AS date))",
        old=(now - OLDEST).date(),
        new=now.date(),
    )
    await keep_partitions(forgetful, now)
    assert await read_all(forgetful, "SELECT id FROM usage_stamps") == [("new",)]
