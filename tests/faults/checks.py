"""The questions at the end: is what the clients were told true? Each answer is read from the parts themselves."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import httpx
from sqlalchemy import text
from stripe import Event

from tallystick import db
from tallystick.resources import Resources
from tallystick.usage.buffer import GROUP, STREAM, buffered_bytes
from tallystick.usage.conservation import count_conservation
from tallystick.webhooks.drift import check_mirror
from tallystick.webhooks.translate import HANDLED_TYPES
from tests.faults.business import Business
from tests.faults.clients import Body, Book, Key

# What each status must mean for access under the default rules; the others depend on payments, whose state the mirror
# is compared for.
ACCESS_OF = {"active": "active", "trialing": "active", "canceled": "none"}

READ_LEDGER = text("SELECT source, id, customer_ref, value, timestamp, stamped FROM usage_events")
READ_CONFLICTS = text("SELECT source, id, customer_ref, value, timestamp FROM usage_conflicts")

# Rows that wait. When all is well again there are none of any kind.
WAITING = text("""
    SELECT 'deliveries', count(*) FROM usage_deliveries WHERE state IN ('pending', 'sending')
    UNION ALL SELECT 'open totals', count(*) FROM usage_totals t WHERE quantity <> sealed AND bucket_end <= :ended_by
    UNION ALL SELECT 'seal requests', count(*) FROM seal_requests
    UNION ALL SELECT 'notifications', count(*) FROM notifications WHERE fanned_out_at IS NULL
    UNION ALL SELECT 'notification deliveries', count(*) FROM notification_deliveries
               WHERE state IN ('queued', 'pending', 'sending')
    UNION ALL SELECT 'final invoices to be looked at', count(*) FROM invoices
               WHERE finalized_at IS NOT NULL AND usage_checked_at IS NULL
    UNION ALL SELECT 'failed webhooks', count(*) FROM stripe_event_failures
""")
REFRESHED = ("customers", "products", "prices", "subscriptions", "invoices")
STATES = text("SELECT state, count(*) FROM usage_deliveries GROUP BY state")
SETTLED_STATES = {"sent", "confirmed", "parked", "voided"}


@dataclass
class Findings:
    """What was counted, and every invariant that does not hold, by its number."""

    accepted: int = 0
    lost: list[Key] = field(default_factory=list)
    doubled: list[Key] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    webhooks_sent: int = 0
    webhooks_acknowledged: int = 0
    webhooks_lost: list[str] = field(default_factory=list)

    @property
    def good(self) -> bool:
        """Whether everything holds."""
        return not (self.lost or self.doubled or self.broken or self.webhooks_lost)

    def fail(self, invariant: str, what: str) -> None:
        """Note what does not hold."""
        self.broken.append(f"{invariant}: {what}")


async def count_waiting(resources: Resources, ended_by: datetime) -> dict[str, int]:
    """How much waits, by kind; of the open totals those whose bucket had ended by a moment."""
    async with db.transaction(resources.engine) as connection:
        waiting = {str(kind): int(n) for kind, n in await connection.execute(WAITING, {"ended_by": ended_by})}
        for table in REFRESHED:
            waiting[f"{table} to be refreshed"] = (
                await connection.scalar(text(f"SELECT count(*) FROM {table} WHERE needs_refresh"))  # noqa: S608
            ) or 0
    waiting["batches"] = await resources.redis.xlen(STREAM)
    return {kind: number for kind, number in waiting.items() if number}


async def check_usage(resources: Resources, book: Book, findings: Findings) -> dict[Key, list[Body]]:
    """I1 and I2. Gives the ledger by key."""
    async with db.transaction(resources.engine) as connection:
        ledger: dict[Key, list[Body]] = defaultdict(list)
        times: dict[Key, datetime] = {}
        for row in await connection.execute(READ_LEDGER):
            ledger[(row.source, row.id)].append(
                Body(row.customer_ref, row.value, None if row.stamped else row.timestamp)
            )
            times[(row.source, row.id)] = row.timestamp
        aside: dict[Key, list[Body]] = defaultdict(list)
        for row in await connection.execute(READ_CONFLICTS):
            aside[(row.source, row.id)].append(Body(row.customer_ref, row.value, row.timestamp))
        conserved = await count_conservation(connection)
    findings.accepted = len(book.told)
    findings.lost = sorted(key for key in book.told if key not in ledger)
    findings.doubled = sorted(key for key, bodies in ledger.items() if len(bodies) > 1)
    for key, bodies in ledger.items():
        if any(body not in book.sent.get(key, []) for body in bodies):
            findings.fail("I1", f"{key} is in the ledger with a body that was never sent")
    for key, told in book.told.items():
        known = [(body.customer, body.value) for body in ledger.get(key, []) + aside.get(key, [])]
        if key in ledger and any((body.customer, body.value) not in known for body in told):
            findings.fail("I1", f"{key} was accepted with a body that is in no table")
    if conserved.difference:
        findings.fail("I2", f"the ledger and its states differ by {conserved.difference}")
    if conserved.accepted != sum((body.value for bodies in ledger.values() for body in bodies), Decimal(0)):
        findings.fail("I2", "the ledger's sum is not that of its events")
    return ledger


async def check_stripe(
    resources: Resources, control: httpx.AsyncClient, business: Business, findings: Findings, *, invoices: bool
) -> None:
    """I3: customer by customer, what Stripe was told, and what it put on invoices, against the ledger."""
    events = (await control.get("/_fake/meter_events")).json()["meter_events"]
    told: dict[str, Decimal] = defaultdict(Decimal)
    for event in events:
        if event.get("error"):
            findings.fail("I3", f"Stripe drops {event['identifier']}: {event['error']}")
        told[event["customer"]] += Decimal(event["value"])
    for customer in business.customers:
        async with db.transaction(resources.engine) as connection:
            rows = (
                await connection.execute(
                    text("SELECT timestamp, value FROM usage_events WHERE customer_ref = :ref"), {"ref": customer.ref}
                )
            ).all()
        held = sum((row.value for row in rows), Decimal(0))
        if told[customer.id] != held:
            findings.fail("I3", f"{customer.ref}: the ledger has {held}, Stripe was told {told[customer.id]}")
        if not invoices:
            continue
        for (begin, end), quantity in customer.invoiced.items():
            used = sum((row.value for row in rows if begin <= row.timestamp < end), Decimal(0))
            if used != quantity:
                findings.fail("I3", f"{customer.ref}: invoice of {begin:%d %H:%M:%S} has {quantity}, ledger {used}")
        if sum(customer.invoiced.values(), Decimal(0)) != held:
            findings.fail("I3", f"{customer.ref}: its invoices do not add up to {held}: {customer.invoiced}")


async def check_states(resources: Resources, findings: Findings) -> None:
    """I7: nothing waits, and every row is in a state with a name."""
    for kind, number in (await count_waiting(resources, datetime.max.replace(tzinfo=UTC))).items():
        findings.fail("I7", f"{number} {kind} still wait")
    if (left := await buffered_bytes(resources.redis)) != 0:
        findings.fail("I7", f"the buffer is empty and counts {left} bytes")
    if await resources.redis.exists(STREAM):
        for group in await resources.redis.xinfo_groups(STREAM):
            if group["name"] == GROUP.encode() and group["pending"]:
                findings.fail("I7", f"{group['pending']} entries are neither acknowledged nor there")
    async with db.transaction(resources.engine) as connection:
        for state, number in await connection.execute(STATES):
            if state not in SETTLED_STATES or state == "parked":
                findings.fail("I7", f"{number} deliveries are {state}")
        quarantined = await connection.scalar(text("SELECT count(*) FROM stripe_events WHERE verdict = 'quarantined'"))
    if quarantined:
        findings.fail("I7", f"{quarantined} Stripe events are quarantined")


async def check_webhooks(resources: Resources, events: Sequence[Event], findings: Findings) -> None:
    """Every event that Stripe made for us is recorded, the acknowledged ones above all."""
    async with db.transaction(resources.engine) as connection:
        known = set((await connection.execute(text("SELECT id FROM stripe_events"))).scalars())
    ours = [event for event in events if event.type in HANDLED_TYPES]
    findings.webhooks_sent = len(ours)
    findings.webhooks_acknowledged = sum(event.pending_webhooks == 0 for event in ours)
    findings.webhooks_lost = [f"{event.id} {event.type}" for event in ours if event.id not in known]


async def check_access(
    resources: Resources, api: httpx.AsyncClient, told: Mapping[str, Mapping[str, Any]] | None, findings: Findings
) -> None:
    """I4: the mirror is what Stripe has; access follows from it, and is what the last notification said."""
    checked = await check_mirror(resources, datetime.now(UTC))
    for drift in checked.drift:
        findings.fail("I4", f"{drift.kind} {drift.id}: {drift.differences}")
    statuses: dict[str, set[str]] = defaultdict(set)
    page = await resources.stripe.v1.subscriptions.list_async({"status": "all", "limit": 100})
    async for subscription in page.auto_paging_iter():
        statuses[str(subscription.customer)].add(subscription.status)
    for customer, found in statuses.items():
        answer = await api.get(f"/v1/customers/{customer}/access")
        access = answer.json().get("access")
        if len(found) == 1 and ACCESS_OF.get(status := next(iter(found)), access) != access:
            findings.fail("I4", f"{customer} is {status} at Stripe and its access is {access}")
        if told is not None and (said := told.get(customer, {}).get("access")) != access:
            findings.fail("I4", f"{customer}: access is {access}, the last notification says {said}")
