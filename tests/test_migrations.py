"""What a migration makes of the rows that are there."""

import secrets
from collections.abc import AsyncIterator
from datetime import UTC, datetime

import pytest
from alembic import command
from alembic.config import Config
from sqlalchemy import Connection, text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from tallystick import schema
from tallystick.errors import SchemaError
from tests.conftest import Servers

HOUR = datetime(2026, 11, 1, 9, tzinfo=UTC)

# Two of the three events of `calls` were sealed, one by one; the one of `bytes` was not.
TOTALS = text("""
    INSERT INTO usage_totals (customer_ref, meter, bucket_start, bucket_end, aggregation, seal, quantity, events,
                              sealed, sealed_events)
    VALUES ('acme', 'calls', :hour, :end, 'count', 3, 3, 3, 2, 2), ('acme', 'bytes', :hour, :end, 'sum', 2, 1, 1, 0, 0)
""")
EVENTS = text("""
    INSERT INTO usage_events (source, id, day, customer_ref, meter, value, timestamp, stamped, received_at, total_id,
                              seal)
    SELECT 's', t.meter || n, '2026-11-01', 'acme', t.meter, 1, :hour, false, :hour, t.id, n
      FROM usage_totals t, generate_series(1, 3) n WHERE t.meter = 'calls' OR n = 2
""")


@pytest.fixture
async def empty_database(servers: Servers) -> AsyncIterator[AsyncEngine]:
    """A database of its own, without a schema."""
    base = servers.postgres.url.replace("postgresql://", "postgresql+asyncpg://")
    name = f"migrated_{secrets.token_hex(4)}"
    server = create_async_engine(base, isolation_level="AUTOCOMMIT")
    async with server.connect() as connection:
        await connection.execute(text(f"CREATE DATABASE {name}"))
    engine = create_async_engine(base.rpartition("/")[0] + f"/{name}")
    yield engine
    await engine.dispose()
    async with server.connect() as connection:
        await connection.execute(text(f"DROP DATABASE {name}"))
    await server.dispose()


def upgrade(connection: Connection, revision: str) -> None:
    config = Config()
    config.set_main_option("script_location", str(schema.migrations_folder()))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    command.upgrade(config, revision)


async def execute(engine: AsyncEngine, *statements: str) -> None:
    async with engine.begin() as connection:
        for statement in statements:
            await connection.execute(text(statement))


async def test_a_database_that_others_use_is_left_alone(empty_database: AsyncEngine) -> None:
    name = empty_database.url.database
    await execute(
        empty_database, *(f"CREATE TABLE {table} (id int)" for table in ("users", "orders", "carts", "pages"))
    )
    with pytest.raises(SchemaError) as refused:
        await schema.migrate(empty_database)
    assert str(refused.value) == (
        f"the database '{name}' holds other tables (carts, orders, pages, …); give tallystick a database of its own"
    )
    # Its own migrations may have the numbers that ours have.
    await execute(
        empty_database,
        "CREATE TABLE alembic_version (version_num varchar(32))",
        "INSERT INTO alembic_version VALUES ('0001')",
    )
    with pytest.raises(SchemaError, match="holds other tables"):
        await schema.migrate(empty_database)


async def test_what_extensions_and_other_schemas_hold_is_in_nobodys_way(empty_database: AsyncEngine) -> None:
    await execute(
        empty_database,
        "CREATE TABLE spatial_ref_sys (srid int)",
        "ALTER EXTENSION plpgsql ADD TABLE spatial_ref_sys",
        "CREATE SCHEMA stripe",
        "CREATE TABLE stripe.customers (id text)",
    )
    await schema.migrate(empty_database)
    await schema.migrate(empty_database)


async def test_a_revision_that_is_not_known_is_named(empty_database: AsyncEngine) -> None:
    await schema.migrate(empty_database)
    await execute(empty_database, "UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(SchemaError, match=r"^the database is at '9999', which this release does not know: .*newer"):
        await schema.migrate(empty_database)
    # Two heads, as others' migrations may have.
    await execute(empty_database, "INSERT INTO alembic_version VALUES ('abc123')")
    async with empty_database.connect() as connection:
        assert not await schema.is_current(connection)


async def test_open_events_of_a_count_meter_stay_open_and_sealed_ones_stay_sealed(empty_database: AsyncEngine) -> None:
    async with empty_database.begin() as connection:
        await connection.run_sync(upgrade, "0012")
        await connection.execute(text("CREATE TABLE usage_events_all PARTITION OF usage_events DEFAULT"))
        for statement in (TOTALS, EVENTS):
            await connection.execute(statement, {"hour": HOUR, "end": HOUR.replace(hour=10)})
    async with empty_database.begin() as connection:
        await connection.run_sync(upgrade, "head")
        open_or_not = text(
            "SELECT e.id, e.seal < t.seal, e.seal = t.seal"
            "  FROM usage_events e JOIN usage_totals t ON t.id = e.total_id ORDER BY e.id"
        )
        assert (await connection.execute(open_or_not)).all() == [
            ("bytes2", False, True),
            ("calls1", True, False),
            ("calls2", True, False),
            ("calls3", False, True),
        ]
        assert (await connection.execute(text("SELECT max(seal) FROM usage_events"))).scalar_one() == 1_000_000_000


DELIVERIES = text("""
    INSERT INTO usage_deliveries (total_id, opened_seal, seal, customer, event_name, identifier, payload, value,
                                  timestamp, state, created_at)
    SELECT t.id, n, n, 'cus_acme', t.meter, s.state, '{}', 1, 0, s.state, :hour
      FROM usage_totals t, unnest(ARRAY['pending', 'parked', 'voided']) WITH ORDINALITY AS s(state, n)
     WHERE t.meter = 'bytes'
""")


async def test_what_the_seal_parked_or_voided_was_settled_when_it_was_written(empty_database: AsyncEngine) -> None:
    async with empty_database.begin() as connection:
        await connection.run_sync(upgrade, "0013")
        await connection.execute(TOTALS, {"hour": HOUR, "end": HOUR.replace(hour=10)})
        await connection.execute(DELIVERIES, {"hour": HOUR})
    async with empty_database.begin() as connection:
        await connection.run_sync(upgrade, "head")
        settled = text("SELECT state, settled_at FROM usage_deliveries ORDER BY id")
        assert (await connection.execute(settled)).all() == [("pending", None), ("parked", HOUR), ("voided", HOUR)]


# Few names, ids and seconds for many rows, so that every way of sharing a name comes about.
CARRYING = """
    SELECT setseed(0.5);
    INSERT INTO customers (id, ref, deleted, account, mark_created)
    SELECT 'cus_' || n, CASE WHEN random() < 0.7 THEN 'ref' || floor(random() * 300) END, random() < 0.3,
           CASE WHEN random() < 0.1 THEN 'acct_1' ELSE '' END,
           CASE WHEN random() < 0.1 THEN '-infinity' ELSE to_timestamp(floor(random() * 4)) END
      FROM generate_series(1, 1500) n;
    INSERT INTO checkout_sessions (id, customer, client_reference_id, deleted, account, mark_created)
    SELECT 'cs_' || n, 'cus_' || ceil(random() * 1500), 'ref' || floor(random() * 600), random() < 0.1,
           CASE WHEN random() < 0.1 THEN 'acct_1' ELSE '' END, to_timestamp(floor(random() * 4))
      FROM generate_series(1, 1500) n;
    UPDATE customers SET ref = 'cus_1' WHERE id IN ('cus_7', 'cus_8');
    INSERT INTO customer_links (ref, customer)
    SELECT DISTINCT ON (ref) 'ref' || floor(random() * 600) AS ref, 'cus_' || ceil(random() * 1500)
      FROM generate_series(1, 60) n
"""


async def test_names_of_customers_are_what_they_were_before_shared_ones_were_found_by_an_index(
    empty_database: AsyncEngine,
) -> None:
    names = text("SELECT customer, account, refs FROM customer_names ORDER BY customer")
    async with empty_database.begin() as connection:
        await connection.run_sync(upgrade, "0018")
        for statement in CARRYING.split(";"):
            await connection.execute(text(statement))
        before = (await connection.execute(names)).all()
    async with empty_database.begin() as connection:
        await connection.run_sync(upgrade, "0019")
        after = (await connection.execute(names)).all()

    assert after == before
    assert len({ref for row in after for ref in row.refs}) > 300


async def test_the_schema_is_current_at_the_revision_that_alembic_migrates_to(empty_database: AsyncEngine) -> None:
    current = []
    async with empty_database.begin() as connection:
        current.append(await schema.is_current(connection))
        for revision in ("head-1", "head"):
            await connection.run_sync(upgrade, revision)
            current.append(await schema.is_current(connection))
    assert current == [False, False, True]
