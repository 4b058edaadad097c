"""Transactions and readings without SQLAlchemy's layers: whole or not at all, whatever ends them."""

import asyncio
from collections.abc import AsyncIterator
from threading import Thread
from typing import Any

import asyncpg
import pytest
import sqlalchemy
from sqlalchemy import text

from tallystick import db
from tallystick.resources import Resources
from tests.webhooks.stripe_events import read

INSERT = text("INSERT INTO customers (id, ref) VALUES (:id, :ref)")
FIND = text("SELECT id, ref FROM customers WHERE ref = :ref OR id = :id OR id = :ref ORDER BY id")
ONE = text("SELECT CAST(:one AS integer)")
SLEEP = text("SELECT pg_sleep(:seconds)")


async def customers(resources: Resources) -> list[str]:
    return [row["id"] for row in await read(resources, "SELECT id FROM customers ORDER BY id")]


async def insert(resources: Resources, *ids: str, then: Exception | None = None, sleep: float = 0) -> None:
    """Insert customers in one direct transaction, sleep there, and raise what is given."""
    async with db.direct_transaction(resources.engine) as connection:
        for id_ in ids:
            await connection.execute(INSERT, {"id": id_, "ref": "acme"})
        if sleep:
            await connection.execute(SLEEP, {"seconds": sleep})
        if then is not None:
            raise then


@pytest.fixture(autouse=True)
async def one_connection(resources: Resources) -> AsyncIterator[None]:
    """Whatever is left behind is found by the next one."""
    await resources.engine.dispose()
    yield
    assert resources.engine.pool.checkedout() == 0  # type: ignore[attr-defined]


async def test_it_is_committed_and_gives_rows_with_attributes(resources: Resources) -> None:
    async with db.direct_transaction(resources.engine) as connection:
        await connection.execute(INSERT, {"id": "cus_1", "ref": "acme"})
        found = await connection.execute(FIND, {"ref": "acme", "id": "cus_2"})
    assert [(row.id, row.ref) for row in found] == [("cus_1", "acme")]
    assert (found.scalars(), [tuple(row) for row in found]) == (["cus_1"], [("cus_1", "acme")])
    assert await customers(resources) == ["cus_1"]


async def test_an_error_takes_all_of_it_back(resources: Resources) -> None:
    with pytest.raises(KeyError):
        await insert(resources, "cus_1", then=KeyError())
    with pytest.raises(asyncpg.UniqueViolationError):
        await insert(resources, "cus_1", "cus_1")
    assert await customers(resources) == []


async def test_one_that_failed_unnoticed_is_not_taken_for_committed(resources: Resources) -> None:
    async def fail_unnoticed() -> None:
        async with db.direct_transaction(resources.engine) as connection:
            await connection.execute(INSERT, {"id": "cus_1", "ref": "acme"})
            with pytest.raises(asyncpg.UniqueViolationError):
                await connection.execute(INSERT, {"id": "cus_1", "ref": "acme"})

    with pytest.raises(ConnectionError) as refused:
        await fail_unnoticed()
    assert db.is_storage_failure(refused.value)
    assert await customers(resources) == []


@pytest.mark.parametrize("kind", [db.direct_transaction, db.transaction])
async def test_after_one_that_was_cancelled_the_next_is_whole(resources: Resources, kind: type) -> None:
    """The connection of the first is not used again: it may be in a transaction that nobody would commit."""
    with pytest.raises(TimeoutError):
        # PostgreSQL sleeps on, and holds the row until it wakes: no longer than the next tests can wait for it.
        await asyncio.wait_for(insert(resources, "cus_1", sleep=0.5), 0.05)
    async with kind(resources.engine) as connection:
        await connection.execute(INSERT, {"id": "cus_2", "ref": "acme"})
    assert await customers(resources) == ["cus_2"]


async def test_a_value_of_the_wrong_type_says_nothing_against_postgresql(resources: Resources) -> None:
    with pytest.raises(asyncpg.DataError) as wrong:
        await insert(resources, sleep="long")  # type: ignore[arg-type]  # on purpose
    assert not db.is_storage_failure(wrong.value)


async def read_one(resources: Resources, statement: str, **parameters: object) -> object:
    async with db.reading(resources.engine) as connection:
        return (await connection.execute(text(statement), parameters)).scalars()[0]


async def test_only_a_reading_that_ended_leaves_its_connection_to_the_next(resources: Resources) -> None:
    first = await read_one(resources, "SELECT pg_backend_pid()")
    with pytest.raises(asyncpg.DivisionByZeroError):
        await read_one(resources, "SELECT 1 / :number", number=0)
    assert await read_one(resources, "SELECT pg_backend_pid()") == first
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(read_one(resources, SLEEP.text, seconds=5), 0.05)
    assert await read_one(resources, "SELECT pg_backend_pid()") != first


def end_sessions_meanwhile(resources: Resources) -> None:
    """Have PostgreSQL end all other sessions, while this event loop stands still and hears nothing of it."""

    async def end() -> None:
        connection = await asyncpg.connect(resources.engine.url.set(drivername="postgresql").render_as_string())
        await connection.execute(
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity"
            " WHERE pid <> pg_backend_pid() AND backend_type = 'client backend'"
        )
        await connection.close()

    thread = Thread(target=asyncio.run, args=(end(),))
    thread.start()
    thread.join()


@pytest.mark.parametrize("kind", [db.reading, db.direct_transaction, db.transaction])
async def test_a_session_may_end_between_preparing_a_statement_and_running_it(resources: Resources, kind: Any) -> None:
    """The driver reads in one piece that the statement is prepared and that the session is at its end."""

    async def read_number(number: int, ready: asyncio.Event) -> list[int]:
        async with kind(resources.engine) as connection:
            await connection.execute(ONE, {"one": 1})
            ready.set()
            rows = await connection.execute(text(f"SELECT CAST(:zero AS integer) + {number}"), {"zero": 0})
            return list(rows.scalars())

    prepared = asyncio.Event()
    reading = asyncio.create_task(read_number(2, prepared))
    await prepared.wait()  # and so it has sent the second statement, too
    end_sessions_meanwhile(resources)
    with pytest.raises(db.STORAGE_ERRORS) as ended:
        await reading
    assert db.is_storage_failure(ended.value)
    assert await read_number(3, asyncio.Event()) == [3]


@pytest.mark.parametrize("kind", [db.reading, db.direct_transaction, db.transaction])
async def test_a_server_that_ends_each_session_at_once_has_failed(resources: Resources, kind: Any) -> None:
    """As a proxy does whose server is away: the connection that the pool makes for a cut one is cut, too."""
    engine = resources.engine.sync_engine

    def cut(connection: Any, _: object) -> None:
        connection.driver_connection.terminate()

    sqlalchemy.event.listen(engine, "connect", cut)
    try:
        with pytest.raises(ConnectionError) as refused:
            async with kind(resources.engine):
                pass
    finally:
        sqlalchemy.event.remove(engine, "connect", cut)
    assert db.is_storage_failure(refused.value)
