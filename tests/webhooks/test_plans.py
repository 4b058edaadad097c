"""What a webhook costs does not grow with the number of customers, whatever PostgreSQL's statistics say.

Nor does it grow faster than what its own customer has.
"""

from datetime import UTC, datetime
from typing import Any

import pytest
from sqlalchemy import text

from tallystick import db
from tallystick.access import state
from tallystick.access.links import FIND_CANDIDATES
from tallystick.access.names import FIND_CONCERNED
from tallystick.access.policy import Decision, Invoice, Subscription, decide_access
from tallystick.mirror.statements import TABLES, write_statement
from tallystick.resources import Resources
from tallystick.rules import AccessRules
from tallystick.webhooks.inbox import record_events
from tests.planning import FORGET_STATISTICS
from tests.webhooks.stripe_events import checkout_session, customer, event, invoice, item, subscription, verified

OTHERS = 1_000
FILL = """
    INSERT INTO prices (id) SELECT 'price_' || n FROM generate_series(1, {others}) n;
    INSERT INTO customers (id, ref) SELECT 'cus_' || n, 'ref' || n FROM generate_series(1, {others}) n;
    INSERT INTO subscriptions (id, customer, status, announced_status)
    SELECT 'sub_' || n, 'cus_' || n, 'active', 'active' FROM generate_series(1, {others}) n;
    INSERT INTO subscription_items (id, subscription, price)
    SELECT 'si_' || n, 'sub_' || n, 'price_1' FROM generate_series(1, {others}) n;
    INSERT INTO invoices (id, customer, subscription, status)
    SELECT 'in_' || n, 'cus_' || n, 'sub_' || n, 'paid' FROM generate_series(1, {others}) n;
    INSERT INTO customer_access (customer, access, reason, since, prices, rules)
    SELECT 'cus_' || n, 'active', 'subscription_active', now(), '{{}}', '' FROM generate_series(1, {others}) n;
    INSERT INTO period_boundaries (customer, at) SELECT 'cus_' || n, now() FROM generate_series(1, {others}) n;
    INSERT INTO billing_periods (item, price, period_start, period_end, subscription, customer)
    SELECT 'si_' || n, 'price_1', now(), now() + interval '1 day', 'sub_' || n, 'cus_' || n
      FROM generate_series(1, {others}) n;
    INSERT INTO checkout_sessions (id, customer, client_reference_id)
    SELECT 'cs_' || n, 'cus_' || n, 'bought' || n FROM generate_series(1, {others}) n
"""
SHARE_A_NAME = """
    UPDATE customers SET ref = 'shop';
    UPDATE checkout_sessions SET client_reference_id = 'campaign'
"""
# Rows that this connection has read, one after the other or by an index, table by table.
READ = text("SELECT relname AS table, seq_tup_read + idx_tup_fetch AS rows FROM pg_stat_xact_user_tables")


async def count_read(connection: db.Connection) -> dict[str, int]:
    return {row.table: row.rows for row in await connection.execute(READ, {})}


@pytest.mark.parametrize("analyzed", [False, True], ids=["never analyzed", "analyzed"])
@pytest.mark.parametrize("mode", ["force_generic_plan", "force_custom_plan"])
async def test_no_table_is_read_through_for_a_few_customers(resources: Resources, analyzed: bool, mode: str) -> None:
    async with db.transaction(resources.engine) as connection:
        for statement in FILL.split(";"):
            await connection.exec_driver_sql(statement.format(others=OTHERS))
        for statement in ["ANALYZE"] if analyzed else FORGET_STATISTICS:
            await connection.exec_driver_sql(statement)
    owing = invoice("in_9", "open", customer="cus_9", of="sub_9")
    bought = checkout_session("cs_new", customer="cus_6", client_reference_id="bought6")
    new = [
        event("checkout.session.completed", bought, at=5),
        event("customer.updated", customer("cus_7", metadata={"tallystick_ref": "ref7"}), at=5),
        event(
            "customer.subscription.updated",
            subscription("sub_8", "past_due", customer="cus_8", items=[item("si_8")]),
            at=5,
        ),
        event("invoice.updated", owing, at=5),
    ]
    late = [
        event("customer.updated", customer("cus_7"), at=5),  # a tie
        event("customer.subscription.updated", subscription("sub_8", customer="cus_8"), at=4),
        event("invoice.payment_failed", owing, at=4),
    ]
    rules, now = AccessRules(), datetime.now(UTC)
    async with db.direct_transaction(resources.engine) as direct:
        await direct.execute(text(f"SET LOCAL plan_cache_mode = {mode}"), {})
        before = await count_read(direct)
        verdicts = [
            await record_events(direct, [verified(resources, one) for one in batch], "tallystick_ref", rules, now)
            for batch in (new, late)
        ]
        after = await count_read(direct)
    assert verdicts[0] == ["applied"] * 4
    assert "stale" in verdicts[1]
    assert {table: rows for table, rows in after.items() if rows - before.get(table, 0) >= OTHERS} == {}


async def test_an_owed_invoice_is_read_once_however_many_subscriptions_its_customer_has(
    resources: Resources, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = 30
    read: list[Invoice] = []

    def decide(subscriptions: list[Subscription], invoices: list[Invoice], *rest: Any, **more: Any) -> Decision:
        read.extend(invoices)
        return decide_access(subscriptions, invoices, *rest, **more)

    monkeypatch.setattr(state, "decide_access", decide)
    failing = [
        one
        for n in range(many)
        for one in (
            event(
                "customer.subscription.updated",
                subscription(f"sub_{n}", "past_due", latest_invoice=f"in_{n}", items=[]),
            ),
            event("invoice.payment_failed", invoice(f"in_{n}", of=f"sub_{n}")),
        )
    ]
    received = [verified(resources, one) for one in failing]
    async with db.direct_transaction(resources.engine) as direct:
        await record_events(direct, received, "tallystick_ref", AccessRules(), datetime.now(UTC))

    assert {one.id for one in read} == {f"in_{n}" for n in range(many)}
    # Once as owed, and once as the latest invoice of its subscription.
    assert len(read) == 2 * many


@pytest.mark.parametrize("analyzed", [False, True], ids=["never analyzed", "analyzed"])
@pytest.mark.parametrize("mode", ["force_generic_plan", "force_custom_plan"])
async def test_who_has_a_name_is_found_without_looking_at_all_that_share_it(
    resources: Resources, analyzed: bool, mode: str
) -> None:
    async with db.transaction(resources.engine) as connection:
        for statement in (FILL + ";" + SHARE_A_NAME).split(";"):
            await connection.exec_driver_sql(statement.format(others=OTHERS))
        for statement in ["ANALYZE"] if analyzed else FORGET_STATISTICS:
            await connection.exec_driver_sql(statement)
    named = {"metadata": {"tallystick_ref": "shop"}}
    batch = [
        event("checkout.session.completed", checkout_session("cs_new", client_reference_id="campaign"), at=5),
        event("customer.created", customer("cus_new", **named), at=5),
        event("customer.updated", customer("cus_7", **named), at=6),
        event("customer.deleted", customer("cus_8", **named), at=6),
    ]
    events = [verified(resources, one) for one in batch]
    async with db.direct_transaction(resources.engine) as direct:
        await direct.execute(text(f"SET LOCAL plan_cache_mode = {mode}"), {})
        before = await count_read(direct)
        await record_events(direct, events, "tallystick_ref", AccessRules(), datetime.now(UTC))
        for ref in ("campaign", "shop"):
            assert await direct.execute(FIND_CANDIDATES, {"ref": ref})
        assert await direct.execute(FIND_CONCERNED, {"refs": ["campaign", "shop"]})
        after = await count_read(direct)
    assert {table: rows for table, rows in after.items() if rows - before.get(table, 0) >= OTHERS // 2} == {}


async def test_the_longest_statement_is_prepared_once(resources: Resources) -> None:
    sql, _ = db._number(write_statement(tuple(TABLES)))
    async with db.direct_transaction(resources.engine) as direct:
        empty = {table: "[]" for table, _ in TABLES.values()}
        children = {"items": "[]", "complete": [], "periods": "[]", "boundaries": "[]"}
        await direct.execute(write_statement(tuple(TABLES)), empty | children)
        prepared = await direct.execute(text("SELECT statement FROM pg_prepared_statements"), {})
    assert sql in prepared.scalars()
