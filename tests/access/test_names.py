"""Whom a name means is written several times, each time for the indexes of one question. They must never disagree.

    customer_names        the names of a customer
    customer_references   the customer of a name
    FIND_CANDIDATES       whom a name means, or would mean without its link
    FIND_CONCERNED        these, and whoever was told that it has the name, or keeps it while nobody has it

What is expected of the last three is read from the first: in a world in which only one kind of name is left, whoever
has a name by the view is the candidate of that kind.
"""

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from random import Random

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from tallystick import db
from tallystick.access import names
from tallystick.access.links import FIND_CANDIDATES
from tallystick.access.names import FIND_CONCERNED, announce_names
from tallystick.resources import Resources
from tallystick.rules import AccessRules
from tallystick.webhooks.inbox import record_events
from tests.conftest import empty_stores
from tests.dying import die_everywhere
from tests.webhooks.stripe_events import NOON, customer, event, read, verified

# Few names, seconds and customers for many rows, so that every way of sharing a name comes about. One that looks
# like an id is nobody's.
NAMES = [f"ref_{number}" for number in range(120)]
LIKE_AN_ID = "cus_3"
CUSTOMERS = [f"cus_{number}" for number in range(250)]

FILL = {
    "customers": """
        INSERT INTO customers (id, account, deleted, ref, mark_created)
        SELECT id, account, deleted, ref, to_timestamp(created)
          FROM json_to_recordset(CAST(:rows AS json))
            AS r(id text, account text, deleted boolean, ref text, created integer)
    """,
    "checkouts": """
        INSERT INTO checkout_sessions (id, account, deleted, customer, client_reference_id, mark_created)
        SELECT id, account, deleted, customer, ref, to_timestamp(created)
          FROM json_to_recordset(CAST(:rows AS json))
            AS r(id text, account text, deleted boolean, customer text, ref text, created integer)
    """,
    "links": """
        INSERT INTO customer_links (ref, customer)
        SELECT ref, customer FROM json_to_recordset(CAST(:rows AS json)) AS r(ref text, customer text)
    """,
    "told": """
        INSERT INTO customer_access (customer, access, reason, since, announced_refs)
        SELECT customer, 'none', 'no_subscription', now(), refs
          FROM json_to_recordset(CAST(:rows AS json)) AS r(customer text, refs text[])
    """,
}

TAKE_AWAY = {
    "links": "DELETE FROM customer_links",
    "metadata": "UPDATE customers SET ref = NULL",
    "checkouts": "DELETE FROM checkout_sessions",
}

Holders = Mapping[str, set[str]]


@dataclass(frozen=True)
class World:
    """What the tables were filled with: who carries a name, whether it has it or not, and what each was told."""

    foreign: set[str]
    deleted: set[str]
    carriers: Holders
    told: Holders


async def make_world(connection: AsyncConnection, random: Random) -> World:
    def chance(probability: float) -> bool:
        return random.random() < probability

    def account() -> str:
        return "acct_1" if chance(0.1) else ""

    def created() -> int:
        return NOON + random.randrange(4)

    names = [*NAMES, LIKE_AN_ID]
    customers = [
        {
            "id": id_,
            "account": account(),
            "deleted": chance(0.3),
            "ref": random.choice(names) if chance(0.7) else None,
            "created": created(),
        }
        for id_ in CUSTOMERS
    ]
    checkouts = [
        {
            "id": f"cs_{number}",
            "account": account(),
            "deleted": chance(0.1),
            "customer": random.choice(CUSTOMERS),
            "ref": random.choice(names),
            "created": created(),
        }
        for number in range(250)
    ]
    links = [{"ref": ref, "customer": random.choice(CUSTOMERS)} for ref in random.sample(NAMES, 15)]
    foreign = {str(one["id"]) for one in customers if one["account"]}
    carriers: dict[str, set[str]] = defaultdict(set)
    for named in customers:
        if named["ref"] is not None and not named["account"]:
            carriers[str(named["ref"])].add(str(named["id"]))
    for checkout in checkouts:
        if not checkout["deleted"] and not checkout["account"]:
            carriers[str(checkout["ref"])].add(str(checkout["customer"]))
    # Whoever lets go of a name is told so at once, so that nobody was told a name that it does not carry.
    told: dict[str, set[str]] = {id_: set() for id_ in CUSTOMERS if chance(0.9)}
    for ref, ids in carriers.items():
        for id_ in (ids & told.keys()) - foreign:
            if ref != LIKE_AN_ID and chance(0.4):
                told[id_].add(ref)
    rows = {
        "customers": customers,
        "checkouts": checkouts,
        "links": links,
        "told": [{"customer": id_, "refs": sorted(refs)} for id_, refs in told.items()],
    }
    for kind, statement in FILL.items():
        await connection.execute(text(statement), {"rows": json.dumps(rows[kind])})
    return World(foreign, {str(one["id"]) for one in customers if one["deleted"]}, carriers, told)


async def read_holders(connection: AsyncConnection, *kinds: str) -> Holders:
    """Who has each name by the view, if there were names of these kinds only."""
    holders: dict[str, set[str]] = defaultdict(set)
    savepoint = await connection.begin_nested()
    for kind, statement in TAKE_AWAY.items():
        if kind not in kinds:
            await connection.execute(text(statement))
    for row in await connection.execute(text("SELECT customer, unnest(refs) AS ref FROM customer_names")):
        holders[row.ref].add(row.customer)
    await savepoint.rollback()
    return holders


async def find_candidates(connection: AsyncConnection, ref: str) -> set[str]:
    return set(await connection.scalars(FIND_CANDIDATES, {"ref": ref}))


seeds = pytest.mark.parametrize("seed", range(4))


@seeds
async def test_a_name_has_one_customer_or_those_that_are_gone(resources: Resources, seed: int) -> None:
    async with db.transaction(resources.engine) as connection:
        world = await make_world(connection, Random(seed))
        holders = await read_holders(connection, *TAKE_AWAY)
        rows = await connection.execute(text("SELECT ref, customer FROM customer_references WHERE ref <> customer"))
        meant = {row.ref: row.customer for row in rows}
    assert len(meant) > len(NAMES) / 2
    for ref in [*NAMES, LIKE_AN_ID]:
        if ref in meant:
            assert holders[ref] == {meant[ref]}, ref
        else:
            assert holders[ref] <= world.carriers[ref] & world.deleted, ref
    assert not holders[LIKE_AN_ID]


@seeds
async def test_candidates_are_whoever_has_the_name_by_each_kind(resources: Resources, seed: int) -> None:
    async with db.transaction(resources.engine) as connection:
        world = await make_world(connection, Random(seed))
        by_kind = {kind: await read_holders(connection, kind) for kind in TAKE_AWAY}
        candidates = {ref: await find_candidates(connection, ref) for ref in NAMES}
    assert {len(found) for found in candidates.values()} == {0, 1, 2, 3}
    for ref in NAMES:
        # A link holds for a customer that is gone, too.
        expected = by_kind["links"][ref] | ((by_kind["metadata"][ref] | by_kind["checkouts"][ref]) - world.deleted)
        assert candidates[ref] - world.foreign == expected, ref


@seeds
async def test_concerned_are_the_candidates_and_whoever_was_told_or_keeps_the_name(
    resources: Resources, seed: int
) -> None:
    async with db.transaction(resources.engine) as connection:
        world = await make_world(connection, Random(seed))
        candidates = {ref: await find_candidates(connection, ref) for ref in NAMES}
        concerned = {ref: set(await connection.scalars(FIND_CONCERNED, {"refs": [ref]})) for ref in NAMES}
        together = list(await connection.scalars(FIND_CONCERNED, {"refs": NAMES}))
    for ref in NAMES:
        told = {id_ for id_, refs in world.told.items() if ref in refs}
        kept = world.carriers[ref] if not candidates[ref] else set()
        assert concerned[ref] == candidates[ref] | told | kept, ref
    assert together == sorted(set().union(*concerned.values()))


@seeds
async def test_when_all_names_were_looked_at_everybody_was_told_its_own(resources: Resources, seed: int) -> None:
    async with db.transaction(resources.engine) as connection:
        await make_world(connection, Random(seed))
        await connection.execute(text("INSERT INTO changed_refs (ref) SELECT unnest(CAST(:r AS text[]))"), {"r": NAMES})
    assert await announce_names(resources, datetime.now(UTC)) == len(NAMES)
    wrong = """
        SELECT a.customer, a.announced_refs, n.refs FROM customer_access a JOIN customer_names n USING (customer)
         WHERE a.announced_refs IS DISTINCT FROM n.refs
    """
    assert await read(resources, wrong) == []


async def take_names(resources: Resources) -> None:
    """Three customers that have lost their names to three others, and were not told yet."""
    await empty_stores(resources)
    for at, newer in enumerate(("", "_2")):
        batch = [
            event("customer.created", customer(f"cus_{n}{newer}", metadata={"tallystick_ref": f"ref_{n}"}), at=at)
            for n in range(3)
        ]
        async with db.direct_transaction(resources.engine) as connection:
            received = [verified(resources, one) for one in batch]
            await record_events(connection, received, "tallystick_ref", AccessRules(), datetime.now(UTC))


async def test_whoever_dies_while_names_are_told_tells_nobody_twice_and_leaves_nobody_out(
    resources: Resources, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(names, "REFS_PER_BATCH", 4)
    monkeypatch.setattr(names, "CUSTOMERS_PER_TRANSACTION", 1)

    async def read_told() -> list[tuple[object, ...]]:
        told = "SELECT customer, data -> 'refs' AS refs FROM notifications ORDER BY customer, number"
        noted = "SELECT ref AS customer, NULL AS refs FROM changed_refs"
        return [tuple(row.values()) for query in (told, noted) for row in await read(resources, query)]

    steps, end = await die_everywhere(
        resources, lambda: take_names(resources), lambda now: announce_names(resources, now), read_told
    )
    assert end == [
        told for n in range(3) for told in ((f"cus_{n}", [f"ref_{n}"]), (f"cus_{n}", []), (f"cus_{n}_2", [f"ref_{n}"]))
    ]
    assert len(steps) > 2 * len(end) / 3
