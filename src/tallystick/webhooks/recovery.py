"""Recovery: find the events that no webhook brought in Stripe's own list, and run them through the same flow.

A pass reads the list from its newest event back to where the last complete pass began, and some minutes further:

    1. lease    one process at a time, so that two do not read the same list; a dead one's lease runs out
    2. begin    note the list's newest event: the next pass comes back to here
    3. pages    per page: which ids are unknown → the inbox → the page is done and the cursor moves on
    4. publish  `complete_until`, when all pages are done

Stripe lists the newest events first, and that is also the order in which customers want to be right again. What a crash
leaves behind: the cursor of the last page that was done. What came after it is looked at again; events that were
recorded meanwhile, by this pass or by a late webhook, are known or duplicates.

Stripe keeps events for 30 days (https://docs.stripe.com/api/events/list). What was missed before that is a gap, which
is reported until `sync` has read the objects themselves.
"""

import asyncio
import hashlib
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any

import structlog
from sqlalchemy import text

from tallystick import db
from tallystick.errors import Problem, StorageFailed, Unavailable
from tallystick.metrics import EVENTS_COMPLETE_UNTIL, EVENTS_GAP_SECONDS, EVENTS_RECOVERED
from tallystick.resources import Resources
from tallystick.stripe_limits import EVENT_TYPES_PER_LIST, EVENTS_LISTED_FOR
from tallystick.webhooks.inbox import Inbox
from tallystick.webhooks.reading import Reader
from tallystick.webhooks.translate import HANDLED_TYPES, id_of, instant
from tallystick.webhooks.translate import text as usable_text
from tallystick.webhooks.verification import StripeEvent

log = structlog.get_logger()

# Stripe's list is not promised to be in step with its webhooks; an event may show up in it a little late.
LISTED_WITHIN = timedelta(minutes=5)
# One hour less than Stripe's, because a pass takes its time.
LISTED_FOR = EVENTS_LISTED_FOR - timedelta(hours=1)
# Beside what reading a page from Stripe may take: until its events are stored, or it is given up.
STORED_WITHIN = timedelta(seconds=30)
# After that the newest events are worth more than the calls that are saved.
RESUMED_WITHIN = timedelta(hours=1)
# A worker that is told to stop ends its run first.
RUN_FOR_SECONDS = 20

# Leases are measured by PostgreSQL's clock: the processes' own may differ.
CLAIM = text("""
    INSERT INTO event_recovery AS r (leased_by, leased_until) VALUES (:holder, clock_timestamp() + :lease)
    ON CONFLICT (only_row) DO UPDATE SET leased_by = excluded.leased_by, leased_until = excluded.leased_until
     WHERE r.leased_until <= clock_timestamp() OR r.leased_by = :holder
    RETURNING *
""")

BEGIN = text("""
    UPDATE event_recovery
       SET pass_started_at = :started_at, pass_since = :since, pass_newest = :newest, pass_types = :types,
           pass_group = 0, pass_cursor = NULL, pass_failed = false
     WHERE leased_by = :holder
""")

FIND_KNOWN = text("SELECT id FROM stripe_events WHERE id = ANY(:ids)")

# Only the holder of the lease has a say: a process that was taken for dead must not move the cursor back.
SAVE = text("""
    UPDATE event_recovery
       SET pass_group = :group, pass_cursor = :cursor, pass_failed = :failed, leased_until = clock_timestamp() + :lease
     WHERE leased_by = :holder
    RETURNING true
""")

# A gap that was there before is not forgotten: only `sync` closes it.
PUBLISH = text("""
    UPDATE event_recovery
       SET complete_until = :complete_until, newest_event = coalesce(pass_newest, newest_event), types = pass_types,
           gap_from = coalesce(gap_from, :gap_from), gap_until = coalesce(:gap_until, gap_until), pass_started_at = NULL
     WHERE leased_by = :holder
    RETURNING true
""")

ABANDON = text("UPDATE event_recovery SET pass_started_at = NULL WHERE leased_by = :holder")

RELEASE = text("UPDATE event_recovery SET leased_by = NULL, leased_until = '-infinity' WHERE leased_by = :holder")

READ_STATE = text("SELECT complete_until, gap_from, gap_until FROM event_recovery")


@dataclass(frozen=True)
class RecoveryState:
    """Until when all events are recorded, and the gap before Stripe's list began, if there is one."""

    complete_until: datetime | None = None
    gap_from: datetime | None = None
    gap_until: datetime | None = None

    def as_json(self) -> dict[str, str | None]:
        return {name: value and value.isoformat() for name, value in vars(self).items()}


@dataclass(frozen=True)
class Run:
    """What one run did. `busy`: another process is at it. `done`: the pass is complete.

    `share` of the pass is done, from 0 to 1; `reached` is the time back to which the present list was read.
    """

    busy: bool = False
    done: bool = False
    listed: int = 0
    recovered: int = 0
    failed: int = 0
    share: float = 0
    reached: datetime | None = None


@dataclass(frozen=True)
class Pass:
    """The pass under way, as in the columns of the same names, and what was complete before it."""

    started_at: datetime
    since: datetime | None
    group: int
    cursor: str | None
    failed: bool
    complete_until: datetime | None


async def recover_events(resources: Resources, now: datetime) -> int:
    """The worker's loop: one run of some seconds; how many events were recovered. The next run goes on from there."""
    run = await recover(resources, now, run_for_seconds=RUN_FOR_SECONDS)
    state = await read_recovery(resources)
    if state.complete_until is not None:
        EVENTS_COMPLETE_UNTIL.set(state.complete_until.timestamp())
    gap = state.gap_until - state.gap_from if state.gap_until and state.gap_from else timedelta(0)
    EVENTS_GAP_SECONDS.set(gap.total_seconds())
    return run.recovered


async def read_recovery(resources: Resources) -> RecoveryState:
    """Until when the events are complete, as last published."""
    async with db.transaction(resources.engine) as connection:
        row = (await connection.execute(READ_STATE)).one_or_none()
    return RecoveryState(*row) if row is not None else RecoveryState()


async def recover(
    resources: Resources,
    now: datetime,
    *,
    run_for_seconds: float | None = None,
    report: Callable[[Run], None] | None = None,
) -> Run:
    """Go on with the pass under way, or begin one; until it is complete, or for so many seconds.

    `report` is called after each page. Raises Stripe's errors, `StorageFailed`, and what SQLAlchemy raises; the next
    run goes on after the last page that was done.
    """
    holder, reader, inbox = secrets.token_hex(8), Reader(resources), Inbox(resources)
    clock = asyncio.get_running_loop().time
    ends_at = None if run_for_seconds is None else clock() + run_for_seconds
    await inbox.start()
    try:
        run = Run()
        while (under_way := await _resume_or_begin(reader, holder, now)) is not None:
            run = await _read_lists(reader, inbox, under_way, holder, run, ends_at, report)
            # A pass that was resumed knows nothing of what has happened since it began.
            if not run.done or under_way.started_at >= now:
                return run
        return replace(run, busy=True)
    finally:
        await inbox.stop()
        async with db.transaction(resources.engine) as connection:
            await connection.execute(RELEASE, {"holder": holder})


def _lease(reader: Reader) -> timedelta:
    """Longer than a page's call to Stripe can take, tries included, so that only the dead lose their lease.

    Some pages need two calls: the first of a pass, and one whose cursor is gone. When both of them take that long,
    another process reads the page as well. That does no harm: each event is recorded once, and the cursor is moved by
    the holder of the lease alone.
    """
    return reader.longest_call + STORED_WITHIN


def listed_types() -> list[str]:
    """The handled types that Stripe's list has. Thin events (`v1.…`) are in no list."""
    return [type_ for type_ in HANDLED_TYPES if not type_.startswith(("v1.", "v2."))]


async def _resume_or_begin(reader: Reader, holder: str, now: datetime) -> Pass | None:
    """Take the lease, and the pass that was interrupted lately or a new one; None when another process is at it."""
    async with db.transaction(reader.resources.engine) as connection:
        row = (await connection.execute(CLAIM, {"holder": holder, "lease": _lease(reader)})).one_or_none()
    if row is None:
        return None
    types = hashlib.sha256(" ".join(listed_types()).encode()).hexdigest()
    if (
        row.pass_started_at is not None
        and row.pass_types == types
        and timedelta(0) <= now - row.pass_started_at <= RESUMED_WITHIN
    ):
        return Pass(
            started_at=row.pass_started_at,
            since=row.pass_since,
            group=row.pass_group,
            cursor=row.pass_cursor,
            failed=row.pass_failed,
            complete_until=row.complete_until,
        )
    # A release that handles more types than the one before has the whole list read once.
    since = row.newest_event - LISTED_WITHIN if row.newest_event is not None and row.types == types else None
    newest = await reader.newest_event()
    begun = {"started_at": now, "since": since, "newest": newest, "types": types, "holder": holder}
    async with db.transaction(reader.resources.engine) as connection:
        await connection.execute(BEGIN, begun)
    return Pass(now, since, group=0, cursor=None, failed=False, complete_until=row.complete_until)


async def _read_lists(
    reader: Reader,
    inbox: Inbox,
    under_way: Pass,
    holder: str,
    run: Run,
    ends_at: float | None,
    report: Callable[[Run], None] | None,
) -> Run:
    types, clock = listed_types(), asyncio.get_running_loop().time
    groups = [types[start : start + EVENT_TYPES_PER_LIST] for start in range(0, len(types), EVENT_TYPES_PER_LIST)]
    run = replace(run, done=False)
    while under_way.group < len(groups):
        if ends_at is not None and clock() >= ends_at:
            return run
        wanted: dict[str, object] = {"types": groups[under_way.group]}
        if under_way.since is not None:
            wanted["created"] = {"gte": int(under_way.since.timestamp())}
        events, cursor = await reader.page("/v1/events", under_way.cursor, **wanted)
        recovered, failed = await _submit_unknown(reader.resources, inbox, events)
        under_way = replace(
            under_way,
            group=under_way.group if cursor is not None else under_way.group + 1,
            cursor=cursor,
            failed=under_way.failed or failed > 0,
        )
        reached = instant(events[-1]["created"]) if cursor is not None else None
        # Died before this: the page is looked at again, and what it brought is known by then.
        if not await _save(reader, under_way, holder):
            return replace(run, busy=True)  # we were taken for dead; another goes on
        run = replace(
            run,
            listed=run.listed + len(events),
            recovered=run.recovered + recovered,
            failed=run.failed + failed,
            share=(under_way.group + _share(under_way, reached)) / len(groups),
            reached=reached,
        )
        if report is not None:
            report(run)
    return replace(run, done=await _end(reader.resources, under_way, holder))


def _share(under_way: Pass, reached: datetime | None) -> float:
    """How much of the present list has been read, by the times of its events."""
    if reached is None:
        return 0
    length = LISTED_FOR if under_way.since is None else under_way.started_at - under_way.since
    return min(max((under_way.started_at - reached) / max(length, LISTED_WITHIN), 0), 1)


async def _submit_unknown(resources: Resources, inbox: Inbox, listed: Sequence[Mapping[str, Any]]) -> tuple[int, int]:
    """Run those events of a page through the inbox that are not recorded; how many were recovered, and how many failed.

    An event that our own code fails on is counted there, and in quarantine after some hours.
    """
    async with db.transaction(resources.engine) as connection:
        known = set((await connection.execute(FIND_KNOWN, {"ids": [event["id"] for event in listed]})).scalars())
    unknown = [to_event(event) for event in listed if event["id"] not in known]
    # Each is awaited to its end, so that no error of one leaves another running.
    results = await asyncio.gather(*(inbox.submit(event) for event in unknown), return_exceptions=True)
    recovered = failed = 0
    for event, result in zip(unknown, results, strict=True):
        if isinstance(result, str):
            recovered += result != "duplicate"
            log.info("stripe_event_recovered", event_id=event.id, type=event.type, verdict=result)
        elif isinstance(result, Problem) and not isinstance(result, StorageFailed | Unavailable):
            failed += 1
        else:
            raise result
    EVENTS_RECOVERED.inc(recovered)
    return recovered, failed


def to_event(listed: Mapping[str, Any]) -> StripeEvent:
    """An event that Stripe's API answered with. Raises `ValueError` when it lacks what every event has."""
    event_id, type_, created = usable_text(listed["id"]), usable_text(listed["type"]), instant(listed["created"])
    if event_id is None or type_ is None or created is None:
        raise ValueError("Stripe listed an event without a usable id, type or created")
    subject = listed["data"]["object"]
    return StripeEvent(
        id=event_id,
        type=type_,
        livemode=bool(listed["livemode"]),
        api_version=usable_text(listed.get("api_version")),
        object_id=id_of(subject),
        created=created,
        body=listed,
    )


async def _save(reader: Reader, under_way: Pass, holder: str) -> bool:
    async with db.transaction(reader.resources.engine) as connection:
        saved = await connection.execute(
            SAVE,
            {
                "group": under_way.group,
                "cursor": under_way.cursor,
                "failed": under_way.failed,
                "lease": _lease(reader),
                "holder": holder,
            },
        )
        return saved.scalar() is True


async def _end(resources: Resources, under_way: Pass, holder: str) -> bool:
    """Publish that the events are complete; or not, when some failed: then the next pass looks at them again."""
    if under_way.failed:
        async with db.transaction(resources.engine) as connection:
            await connection.execute(ABANDON, {"holder": holder})
        return False
    listed_from = under_way.started_at - LISTED_FOR
    missed = under_way.complete_until is not None and under_way.complete_until < listed_from
    if missed:
        log.error("stripe_events_lost", until=listed_from.isoformat(), mend="tallystick sync")
    async with db.transaction(resources.engine) as connection:
        published = await connection.execute(
            PUBLISH,
            {
                "complete_until": under_way.started_at - LISTED_WITHIN,
                "gap_from": under_way.complete_until if missed else None,
                "gap_until": listed_from if missed else None,
                "holder": holder,
            },
        )
        return published.scalar() is True
