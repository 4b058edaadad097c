"""What a migration makes of the rows that are there."""

import secrets
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from alembic import command
from alembic.config import Config
from sqlalchemy import Connection, text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from tallystick import schema
from tallystick.errors import SchemaError
from tallystick.resources import open_resources
from tallystick.usage.conservation import count_conservation
from tallystick.usage.sealing import seal_everything
from tests.conftest import Servers, make_settings

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


# What a service had at 0014: each total with its events, deliveries in every state, and all that is beside them.
OLD_ROWS = """
    CREATE TABLE usage_events_all PARTITION OF usage_events DEFAULT;
    INSERT INTO customers (id, ref, deleted) VALUES ('cus_old', 'acme', true), ('cus_acme', 'acme', false),
                                                    ('cus_solo', 'solo', false);
    INSERT INTO subscriptions (id, customer, status) VALUES ('sub_1', 'cus_acme', 'active');
    INSERT INTO meters (id, event_name, formula, customer_key, value_key, status)
    SELECT 'mtr_' || name, name, formula, 'stripe_customer_id', 'value', 'active'
      FROM (VALUES ('states', 'sum'), ('bytes', 'sum'), ('hits', 'count'), ('gauge', 'last'), ('peak', 'last'),
                   ('users', 'last')) m(name, formula);

    -- Of `states` each event is a delivery of its own, but for one that is open, and one was taken back. Of `bytes` two
    -- deliveries carry one seal, for its digits. Of `records` one event, told by usage records, was refused in the end.
    INSERT INTO usage_totals (customer_ref, meter, bucket_start, bucket_end, opened_at, aggregation, quantity, events,
                              sealed, sealed_events, seal, sealed_at, last_at, last_key)
    SELECT ref, meter, :hour, CAST(:hour AS timestamptz) + interval '1 hour', :hour, aggregation, quantity, events,
           sealed, sealed_events, seal, CASE WHEN events = sealed_events THEN CAST(:hour AS timestamptz) END,
           CASE WHEN aggregation = 'last' THEN CAST(:hour AS timestamptz) END,
           CASE WHEN aggregation = 'last' THEN 'key' END
      FROM (VALUES ('acme', 'states', 'sum', 36, 8, 28, 7, 8),
                   ('acme', 'bytes', 'sum', 1000000000000000, 2, 1000000000000000, 2, 3),
                   ('acme', 'hits', 'count', 3, 3, 2, 2, 1000000000),
                   ('acme', 'gauge', 'last', 9, 2, 9, 2, 2),
                   ('acme', 'peak', 'max', 7, 2, 0, 0, 1),
                   ('acme', 'users', 'unique_count', 2, 2, 2, 2, 2),
                   ('acme', 'records', 'sum', 5, 1, 5, 1, 2),
                   ('nobody', 'states', 'sum', 1.5, 1, 0, 0, 1))
           t(ref, meter, aggregation, quantity, events, sealed, sealed_events, seal);
    INSERT INTO usage_events (source, id, day, customer_ref, meter, value, timestamp, stamped, received_at, total_id,
                              seal, properties)
    SELECT 's', t.customer_ref || '-' || t.meter || e.n, CAST(:hour AS date), t.customer_ref, t.meter, e.value, :hour,
           false, :hour, t.id, e.seal, CASE WHEN t.meter = 'users' THEN jsonb_build_object('user', 'u' || e.n) END
      FROM usage_totals t
      JOIN (VALUES ('states', 1, 1, 1), ('states', 2, 2, 2), ('states', 3, 3, 3), ('states', 4, 4, 4),
                   ('states', 5, 5, 5), ('states', 6, 6, 6), ('states', 7, 7, 7), ('states', 8, 8, 8),
                   ('states', 9, -1, 9),
                   ('bytes', 1, 1, 999999999999999), ('bytes', 2, 1, 1),
                   ('hits', 1, 1, 1), ('hits', 2, 2, 1), ('hits', 3, 1000000000, 1),
                   ('gauge', 1, 1, 4), ('gauge', 2, 1, 9), ('peak', 1, 1, 7), ('peak', 2, 1, 3),
                   ('users', 1, 1, 1), ('users', 2, 1, 1), ('records', 1, 1, 5)) e(meter, n, seal, value)
        ON e.meter = t.meter AND t.customer_ref = 'acme'
     UNION ALL
    SELECT 's', 'nobody', CAST(:hour AS date), 'nobody', 'states', 1.5, :hour, false, :hour, id, 1, NULL
      FROM usage_totals WHERE customer_ref = 'nobody';
    INSERT INTO usage_deliveries (total_id, opened_seal, seal, events, customer, event_name, identifier, payload, value,
                                  timestamp, state, reason, aggregation, sender, attempts, lease_until, unknown_since,
                                  settled_at, confirmed_at, carried_from, taken_late)
    SELECT t.id, d.opened, d.seal, d.events, 'cus_acme', t.meter, t.meter || '-' || d.seal, '{}', d.value,
           extract(epoch FROM CAST(:hour AS timestamptz)), d.state, d.reason, t.aggregation,
           CASE WHEN t.meter = 'records' THEN 'usage_records' ELSE 'meter_events' END, d.attempts,
           CASE WHEN d.state = 'sending' THEN CAST(:hour AS timestamptz) END,
           CASE WHEN d.reason = 'outcome_unknown' THEN CAST(:hour AS timestamptz) END,
           CASE WHEN d.state NOT IN ('pending', 'sending') THEN CAST(:hour AS timestamptz) END,
           CASE WHEN d.state = 'confirmed' THEN CAST(:hour AS timestamptz) END,
           CASE WHEN d.reason = 'repeat' THEN CAST(:hour AS timestamptz) END, coalesce(d.reason = 'repeat', false)
      FROM usage_totals t
      JOIN (VALUES ('states', 1, 1, 1, 1, 'pending', NULL, 0), ('states', 2, 2, 1, 2, 'sending', NULL, 1),
                   ('states', 3, 3, 1, 3, 'sent', 'repeat', 2), ('states', 4, 4, 1, 4, 'confirmed', NULL, 1),
                   ('states', 5, 5, 1, 5, 'parked', 'period_closed', 0),
                   ('states', 6, 6, 1, 6, 'parked', 'outcome_unknown', 2),
                   ('states', 7, 7, 1, 7, 'voided', 'voided by a person: a test', 1),
                   ('states', -1, -1, 1, 9, 'voided', 'correction', 0),
                   ('bytes', 1, 1, 2, 999999999999999, 'sent', NULL, 1), ('bytes', 1, 2, 0, 1, 'pending', NULL, 0),
                   ('hits', 1, 1, 1, 1, 'sent', NULL, 1), ('hits', 2, 2, 1, 1, 'pending', NULL, 0),
                   ('gauge', 1, 1, 2, 9, 'confirmed', NULL, 1), ('users', 1, 1, 2, 2, 'sent', NULL, 1),
                   ('records', 1, 1, 1, 5, 'parked', 'outcome_unknown', 2))
           d(meter, opened, seal, events, value, state, reason, attempts)
        ON d.meter = t.meter AND t.customer_ref = 'acme';
    INSERT INTO usage_delivery_attempts (delivery_id, attempt, at, outcome, reason)
    SELECT d.id, a.attempt, :hour, a.outcome, a.reason
      FROM usage_deliveries d
     CROSS JOIN (VALUES (1, 'retry', 'TimeoutError'), (2, 'parked', 'no_subscription_item')) a(attempt, outcome, reason)
     WHERE d.reason = 'outcome_unknown';
    INSERT INTO usage_uniques (total_id, digest)
    SELECT id, sha256('u1') FROM usage_totals WHERE meter = 'users'
     UNION ALL SELECT id, sha256('u2') FROM usage_totals WHERE meter = 'users';
    INSERT INTO usage_group_totals SELECT id, 'region', 'eu', 3, 2 FROM usage_totals WHERE meter = 'bytes';
    INSERT INTO usage_corrections (source, id, event_id, event_day, action, delta, reason, method, state, requested_at)
    SELECT 's', state, 'acme-states1', CAST(:hour AS date), 'void', -1, 'a test', method, state, :hour
      FROM (VALUES ('cancel', 'pending'), ('compensate', 'done'), ('propose', 'proposed'), ('propose', 'settled'))
           c(method, state);
    INSERT INTO usage_thresholds (customer, meter, period_start, threshold, quantity, reached_at)
    VALUES ('cus_acme', 'states', :hour, 10, 36, :hour);
    INSERT INTO usage_drifts (customer, event_name, hour, ours, stripes, first_seen_at, checked_at)
    VALUES ('cus_acme', 'states', :hour, 10, 9, :hour, :hour);
    INSERT INTO usage_checks (customer, event_name, checked_at) VALUES ('cus_acme', 'states', :hour);
    INSERT INTO usage_conflicts (source, id, customer_ref, meter, value, timestamp, received_at)
    VALUES ('s', 'acme-states1', 'acme', 'states', 2, :hour, :hour);
    INSERT INTO usage_stamps (source, id, day) VALUES ('s', 'stamped', CAST(:hour AS date));
    INSERT INTO usage_retired (day, events, quantity) VALUES ('2025-01-01', 0, 0);
    INSERT INTO meter_error_reports (event, type, received_at, next_attempt_at) VALUES ('evt_1', 'a', :hour, :hour)
"""
BASE_TABLES = """
    SELECT relname FROM pg_class
     WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'p') AND NOT relispartition
       AND relname NOT IN ('alembic_version', 'installation') ORDER BY 1
"""


async def read_rows(connection: AsyncConnection) -> dict[str, list[dict[str, Any]]]:
    """All rows of all tables that have some, in one order."""
    tables = list(await connection.scalars(text(BASE_TABLES)))
    rows = {table: list(await connection.scalars(text(f"SELECT to_jsonb(t) FROM {table} t"))) for table in tables}  # noqa: S608
    return {table: sorted(some, key=str) for table, some in rows.items() if some}


async def test_the_usage_of_an_old_service_is_what_it_was_and_goes_on(
    empty_database: AsyncEngine, servers: Servers
) -> None:
    async with empty_database.begin() as connection:
        await connection.run_sync(upgrade, "0014")
        for statement in OLD_ROWS.split(";\n"):
            await connection.execute(text(statement), {"hour": HOUR} if ":hour" in statement else {})
        before, counted = await read_rows(connection), await count_conservation(connection)
    assert counted.holds
    assert all(counted.events_by_state.values()), "every state is there"
    async with empty_database.begin() as connection:
        await connection.run_sync(upgrade, "head")
        after = await read_rows(connection)
        assert await count_conservation(connection) == counted

    # A usage record says what it was refused for, so that it may be said again; the others' outcome stays unknown.
    (record,) = [row for row in before["usage_deliveries"] if row["event_name"] == "records"]
    record["reason"] = "no_subscription_item"
    before["usage_deliveries"].sort(key=str)
    assert {row["property"] for row in after["usage_totals"]} == {None}
    for total in after["usage_totals"]:
        del total["property"]
    assert [row["ref"] for row in after.pop("changed_refs")] == ["acme"]
    for table, rows in before.items():
        assert after[table] == rows, table
    assert after.keys() == before.keys()

    url = empty_database.url.set(drivername="postgresql").render_as_string(hide_password=False)
    settings = make_settings(database_url=url, redis_url=servers.valkey.url)
    async with open_resources(settings, application_name="tests") as resources:
        await resources.redis.flushdb()
        assert await seal_everything(resources, HOUR + timedelta(hours=2)) == 3
        async with empty_database.connect() as connection:
            sealed = await count_conservation(connection)
    assert (sealed.holds, sealed.events_by_state["open"], sealed.events) == (True, 1, counted.events)


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
