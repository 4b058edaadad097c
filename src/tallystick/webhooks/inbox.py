"""`POST /webhooks/stripe` and `/webhooks/stripe/{endpoint}`, from the raw body to the answer.

    1. read and verify   at most 1 MiB, signed by Stripe with one of the endpoint's secrets, now, for its account and
                         mode (verification.py)
    2. translate         what the event says about the mirror (a pure function)
    3. commit a batch    events that wait together share one transaction: ids, the mirror, access, requests to seal
    4. answer            200 after the commit; 500 when it failed, 503 when too many wait for theirs, and Stripe sends
                         the event again for three days

Nothing is written before 1 holds. What a crash leaves behind: before the commit, nothing, and Stripe sends again;
between the commit and the answer, everything, and the repeat is a duplicate. There is no state in between, because the
event's id and its effect are one transaction.

One event must not take its batch along. A batch that met a lock or a slow statement is tried again in halves, with
short limits, while somebody waits for it; one in which our own code failed, event by event. Once PostgreSQL itself
fails, the rest is not tried.
"""

import asyncio
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from contextvars import Context, copy_context
from datetime import UTC, datetime
from itertools import chain
from time import perf_counter
from typing import Literal, NamedTuple

import msgspec
import structlog
from sqlalchemy import text
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from structlog.contextvars import bind_contextvars

from tallystick import db, tracing
from tallystick.access.state import recompute_access
from tallystick.access.timeline import lines_of
from tallystick.bodies import read_body
from tallystick.errors import Problem, StorageFailed, Unavailable
from tallystick.logs import describe_error
from tallystick.metrics import (
    OLDEST_WEBHOOK_SECONDS,
    WEBHOOK_BATCH_SIZE,
    WEBHOOK_EVENTS,
    WEBHOOK_REFUSED,
    WEBHOOK_SECONDS,
    WEBHOOKS_WAITING,
)
from tallystick.mirror.apply import accounts_of, apply_changes, rows_to_lock
from tallystick.mirror.changes import AnyChange, CheckoutSessionChange, CustomerChange, InvoiceChange
from tallystick.mirror.statements import LOCK_CUSTOMERS
from tallystick.resources import Resources
from tallystick.rules import AccessRules
from tallystick.usage.error_reports import ErrorReport, note_error_reports
from tallystick.usage.sealing_requests import request_seals
from tallystick.webhooks.failures import count_failure
from tallystick.webhooks.stale import note_stale
from tallystick.webhooks.translate import Translation, translate
from tallystick.webhooks.verification import StripeEvent, find_endpoint, is_served, read_event

log = structlog.get_logger()

Verdict = Literal["applied", "stale", "duplicate", "ignored", "quarantined"]

# Stripe's largest events (invoices with many lines) have some hundred kilobytes.
MAX_BODY_BYTES = 1024 * 1024

# More in one transaction would make the first of them wait longer without making the rest much cheaper.
BATCH_SIZE = 64
# A batch costs five round trips to PostgreSQL, however many events it has; what comes meanwhile goes together in the
# next. While one waits for PostgreSQL, the other is made ready: they lock their customers in one order, and a third
# would only make all of them smaller.
BATCHES_AT_ONCE = 2
# Lets those whom the last batch answered come along in the next one, too.
GATHER_SECONDS = 0.002
# Some seconds of work. Whoever comes later is better served by Stripe's own retry than by a timeout.
MAX_WAITING = 2_000
RETRY_AFTER_SECONDS = 5

# A transaction ends before the answer is due, and the answer before the 10 s after which a sender may have given up.
COMMIT_WITHIN_SECONDS = 8
ANSWER_WITHIN_SECONDS = 9
# Parts of a batch that was held up: of 64 events the one whose customer is locked is alone after two seconds more. That
# one has waited already, and whoever holds a lock as he should is done in some tens of milliseconds.
AGAIN_LIMITS = {"lock_timeout": "300ms", "statement_timeout": "500ms"}
# Nobody waits for what is not committed when the process stops: its requests were answered, or cut off.
STOP_WITHIN_SECONDS = 2

# Also forgets earlier failures of the events, which are handled now, and locks the customers that they are about, those
# of repeats among them.
RECORD_EVENTS = text(f"""
    WITH handled AS (DELETE FROM stripe_event_failures WHERE id = ANY(:ids)), locked AS ({LOCK_CUSTOMERS.text})
    INSERT INTO stripe_events (id, type, account, livemode, api_version, object_id, created, verdict, error)
    SELECT * FROM json_to_recordset(CAST(:rows AS json))
               AS r(id text, type text, account text, livemode boolean, api_version text, object_id text,
                    created timestamptz, verdict text, error text)
     ORDER BY id
    ON CONFLICT (id) DO NOTHING
    RETURNING id
""")  # noqa: S608  a statement of the mirror

# An id that two accounts use for different objects: only ids that people choose, as of products, can be alike.
NOTE_FOREIGN = text("""
    UPDATE stripe_events SET verdict = 'quarantined', error = 'another account has this id' WHERE id = ANY(:ids)
""")

SHORTEN_LIMITS = text("""
    SELECT set_config('lock_timeout', :lock_timeout, true), set_config('statement_timeout', :statement_timeout, true)
""")


async def receive_webhook(request: Request) -> Response:
    """Take one event from Stripe (https://docs.stripe.com/webhooks).

    200 `{"verdict": …}` once it is committed: `applied`, `stale` (the mirror knows something newer), `duplicate`,
    `ignored` (nothing of it is mirrored) or `quarantined` (it could not be understood); and `not_served`, with nothing
    written, for another connected account or mode than the endpoint's. Problems: 400 it cannot be trusted or is not for
    us, 404 no such endpoint, 413 it is too large, 500 it could not be stored, 503 too much comes at once.
    """
    resources: Resources = request.app.state.resources
    inbox: Inbox = request.app.state.inbox
    settings = resources.settings
    try:
        endpoint = find_endpoint(resources, request.path_params.get("endpoint"), datetime.now(UTC))
        raw = await read_body(request, MAX_BODY_BYTES, request.app.state.arriving_webhooks)
        signature = request.headers.get("stripe-signature")
        event = read_event(raw, signature, endpoint, settings.webhook_tolerance_seconds, datetime.now(UTC))
        bind_contextvars(event_id=event.id)
        if not is_served(event, endpoint, livemode=settings.livemode):
            WEBHOOK_EVENTS.labels("not_served").inc()
            return JSONResponse({"verdict": "not_served"})
        started = perf_counter()
        verdict = await inbox.submit(event)
    except ClientDisconnect:
        return Response(status_code=400)  # it hung up before its body was here, so nobody reads this
    except Problem as problem:
        WEBHOOK_REFUSED.labels(problem.type).inc()
        log.warning("stripe_event_refused", reason=problem.type, path=request.url.path)
        raise
    WEBHOOK_SECONDS.observe(perf_counter() - started)
    WEBHOOK_EVENTS.labels(verdict).inc()
    log.info("stripe_event", type=event.type, verdict=verdict, endpoint=endpoint.name)
    return Response(b'{"verdict":"%s"}' % verdict.encode(), media_type="application/json")


# 2 and 3. Translate, and commit a batch


async def record_events(
    connection: db.Connection, events: Sequence[StripeEvent], reference_key: str, rules: AccessRules, now: datetime
) -> list[Verdict]:
    """Record events and what they change, in the caller's transaction; one verdict for each event, in order."""
    # Reversed, because of several copies a dictionary keeps the last that it is given.
    first_copies = list({event.id: event for event in reversed(events)}.values())
    translations = {event.id: translate(event.body, reference_key) for event in first_copies}
    fresh = await _record(connection, first_copies, translations)
    new = [event for event in first_copies if event.id in fresh]
    changes = [change for event in new if (change := translations[event.id].change) is not None]
    applied = await apply_changes(connection, changes)
    await request_seals(connection, _drafts(new, translations))
    reports = [ErrorReport(event.id, event.type, event.object_id) for event in new if translations[event.id].reports]
    await note_error_reports(connection, reports, now)
    lines, named = lines_of(applied, changes), _named_customers(changes)
    await recompute_access(connection, applied.customers, rules, now, other_lines=lines, named=named)
    verdicts = {event.id: _verdict(translations[event.id], written=event.id in applied.events) for event in new}
    if applied.foreign:
        verdicts |= dict.fromkeys(applied.foreign, "quarantined")
        await connection.execute(NOTE_FOREIGN, {"ids": sorted(applied.foreign)})
    lost = {
        change.mark.event: change
        for change in changes
        if change.mark.event not in applied.events and change.mark.event not in applied.foreign
    }
    await note_stale(connection, lost)
    # The first copy of an event in the batch has its verdict; every other is a duplicate.
    return [verdicts.pop(event.id, "duplicate") for event in events]


def _named_customers(changes: Iterable[AnyChange]) -> set[str]:
    """The customers whose names, as the product has them, these changes may have given or taken."""
    named = {change.id for change in changes if isinstance(change, CustomerChange)}
    return named | {change.customer for change in changes if isinstance(change, CheckoutSessionChange)}


async def _record(
    connection: db.Connection, events: Iterable[StripeEvent], translations: Mapping[str, Translation]
) -> set[str]:
    """Record the events that are not known yet, and lock the customers of all; the ids of those that were recorded."""
    changes = [change for translation in translations.values() if (change := translation.change) is not None]
    rows = [_event_row(event, translations[event.id]) for event in events]
    result = await connection.execute(
        RECORD_EVENTS,
        {
            "ids": list(translations),
            "rows": msgspec.json.encode(rows).decode(),
            "customers": rows_to_lock(accounts_of(changes)),
        },
    )
    return set(result.scalars())


def _verdict(translation: Translation, *, written: bool) -> Verdict:
    if translation.unusable is not None:
        return "quarantined"
    if translation.reports:
        return "applied"
    if translation.change is None:
        return "ignored"
    return "applied" if written else "stale"


def _event_row(event: StripeEvent, translation: Translation) -> dict[str, object]:
    return {
        "id": event.id,
        "type": event.type,
        "account": event.account,
        "livemode": event.livemode,
        "api_version": event.api_version,
        # A summary of entitlements has no id: it is the customer's.
        "object_id": event.object_id or (translation.change.id if translation.change is not None else None),
        "created": event.created,
        "verdict": _verdict(translation, written=True),
        "error": translation.unusable,
    }


def _drafts(events: Sequence[StripeEvent], translations: Mapping[str, Translation]) -> dict[str, str]:
    """The invoices that were just drafted, by customer: their usage is to be told to Stripe while they are drafts.

    Usage is told for the own account only.
    """
    created = [
        translations[event.id].change for event in events if event.type == "invoice.created" and not event.account
    ]
    return {
        change.customer: change.id
        for change in created
        if isinstance(change, InvoiceChange) and change.status == "draft"
    }


class _Waiting(NamedTuple):
    """An event whose request waits for its commit."""

    event: StripeEvent
    committed: asyncio.Future[Verdict]
    since: float
    request: Context  # in which lines about this event carry the request's id


class Inbox:
    """Verified events that wait for their commit, and the tasks that commit them."""

    def __init__(self, resources: Resources) -> None:
        self._resources = resources
        self._waiting: deque[_Waiting] = deque()
        self._arrived = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._open = False

    async def start(self) -> None:
        """Begin to take events."""
        self._open = True
        WEBHOOKS_WAITING.set_function(lambda: len(self._waiting))
        OLDEST_WEBHOOK_SECONDS.set_function(lambda: perf_counter() - self._waiting[0].since if self._waiting else 0)
        self._tasks = [asyncio.create_task(self._run(), name="webhooks") for _ in range(BATCHES_AT_ONCE)]

    async def stop(self) -> None:
        """Commit what was taken and take no more. What cannot be committed in time, Stripe sends again."""
        self._open = False
        self._arrived.set()
        _, unfinished = await asyncio.wait(self._tasks, timeout=STOP_WITHIN_SECONDS)
        for task in unfinished:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._fail(list(self._waiting), StorageFailed("The service is stopping."))

    async def submit(self, event: StripeEvent) -> Verdict:
        """Wait until the event is committed.

        Raises `StorageFailed` when it was not, or not in time, and `Unavailable` when too many wait already.

        A caller that goes away changes nothing: the event is committed with its batch.
        """
        if not self._open:
            raise StorageFailed("The service is stopping.")
        if len(self._waiting) >= MAX_WAITING:
            raise Unavailable("Too many events are waiting.", retry_after_seconds=RETRY_AFTER_SECONDS)
        loop = asyncio.get_running_loop()
        committed: asyncio.Future[Verdict] = loop.create_future()
        waiting = _Waiting(event, committed, perf_counter(), copy_context())
        self._waiting.append(waiting)
        self._arrived.set()
        # It may be committed yet: then the repeat is a duplicate.
        took_too_long = StorageFailed("PostgreSQL took too long.")
        too_late = loop.call_later(ANSWER_WITHIN_SECONDS, self._fail, [waiting], took_too_long)
        try:
            return await committed
        finally:
            too_late.cancel()

    async def _run(self) -> None:
        while batch := await self._take():
            WEBHOOK_BATCH_SIZE.observe(len(batch))
            try:
                await self._settle(batch)
            except asyncio.CancelledError:
                self._fail(batch, StorageFailed("The service is stopping."))
                raise
            except Exception as error:  # noqa: BLE001  the task's edge: if it ended, nobody would commit what comes next
                log.error("stripe_events_not_settled", events=len(batch), **describe_error(error))
                self._fail(batch, StorageFailed())
            await asyncio.sleep(GATHER_SECONDS)

    async def _take(self) -> list[_Waiting]:
        while self._open and not self._waiting:
            self._arrived.clear()
            await self._arrived.wait()
        return [self._waiting.popleft() for _ in range(min(BATCH_SIZE, len(self._waiting)))]

    async def _settle(self, batch: list[_Waiting]) -> None:
        """Commit a batch, or those parts of it that can be committed."""
        parts = deque([batch])
        again = False
        while parts:
            part = parts.popleft()
            if again and all(one.committed.done() for one in part):
                continue  # they were answered meanwhile, and are sent again
            try:
                verdicts = await self._commit([one.event for one in part], again=again)
            except Exception as error:  # noqa: BLE001  the batch's edge: one bad event must not take the others along
                if db.is_held_up(error) and len(part) > 1:
                    half = len(part) // 2
                    parts += [part[:half], part[half:]]
                elif db.is_storage_failure(error):
                    log.warning("stripe_events_not_stored", events=len(part), error=type(error).__name__)
                    self._fail(part, StorageFailed())
                    if not db.is_held_up(error):  # PostgreSQL itself: the rest would only wait for the same
                        self._fail(chain.from_iterable(parts), StorageFailed())
                        parts.clear()
                elif len(part) > 1:
                    parts += [[one] for one in part]
                else:
                    await self._settle_failed(part[0], error)
            else:
                for one, verdict in zip(part, verdicts, strict=True):
                    if verdict == "quarantined":
                        _log_error(one, "stripe_event_quarantined")
                    _answer(one.committed, verdict)
            again = True

    async def _commit(self, events: Sequence[StripeEvent], *, again: bool) -> list[Verdict]:
        reference_key = self._resources.settings.customer_reference_key
        rules = self._resources.rules.current(datetime.now(UTC)).access
        with tracing.span("webhook batch", events=len(events)):
            transaction = db.direct_transaction(self._resources.engine)
            async with asyncio.timeout(COMMIT_WITHIN_SECONDS), transaction as connection:
                if again:
                    await connection.execute(SHORTEN_LIMITS, AGAIN_LIMITS)
                return await record_events(connection, events, reference_key, rules, datetime.now(UTC))

    async def _settle_failed(self, one: _Waiting, error: Exception) -> None:
        """A bug of ours: let Stripe try again some times, in case the next release knows better, then set it aside."""
        _log_error(one, "stripe_event_failed", **describe_error(error))
        name, recorded = type(error).__name__, set[str]()
        try:
            async with asyncio.timeout(COMMIT_WITHIN_SECONDS):
                async with db.transaction(self._resources.engine) as connection:
                    is_last = await count_failure(connection, one.event, name)
                # Died here: the next failure that counts sets it aside. In one transaction, its lock on the failures
                # would be in the way of another process that has recorded the event and is to forget them.
                if is_last:
                    async with db.transaction(self._resources.engine) as connection:
                        recorded = await _record(connection, [one.event], {one.event.id: Translation(unusable=name)})
        except db.STORAGE_ERRORS:
            self._fail([one], StorageFailed())
            return
        if recorded:  # and not handled by another process meanwhile
            _log_error(one, "stripe_event_quarantined", error=name)
            _answer(one.committed, "quarantined")
        else:
            self._fail([one], Problem("The event could not be handled; it is tried again."))

    def _fail(self, batch: Iterable[_Waiting], problem: Problem) -> None:
        for one in batch:
            if not one.committed.done():  # done: its request was cancelled, or gave up waiting
                one.committed.set_exception(problem)


def _log_error(about: _Waiting, line: str, **fields: str) -> None:
    """Write a line as the event's own request would: the task that commits is nobody's."""
    about.request.run(log.error, line, event_id=about.event.id, type=about.event.type, **fields)


def _answer(committed: asyncio.Future[Verdict], verdict: Verdict) -> None:
    if not committed.done():
        committed.set_result(verdict)
