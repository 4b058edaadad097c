"""`POST /v1/usage`, from the body to the answer: validate, claim and append in Redis, or record in the ledger directly.

    1. read     at most 1 MiB of JSON, from a caller whose key has `usage:write`
    2. validate each event by itself; the bad ones are reported, the good ones go on
    3. keep     claim the ids and append the batch in Redis, on disk; without Redis, commit to the ledger
    4. answer   202 with what became of each event

A crash before 3 is done leaves the caller without an answer, so it sends again; whatever had been kept is recognised.
"""

from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import structlog
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from tallystick import db
from tallystick.auth import authenticate
from tallystick.bodies import read_body
from tallystick.errors import Unavailable
from tallystick.metrics import USAGE_EVENTS, USAGE_PATH
from tallystick.resources import Resources
from tallystick.usage.buffer import BufferUnavailable, claim_and_append
from tallystick.usage.events import Rejection, UsageEvent, parse_events
from tallystick.usage.ledger import record_events
from tallystick.usage.meters import find_meters

log = structlog.get_logger()

MAX_BODY_BYTES = 1024 * 1024

# A Redis that does not answer costs each request its time-out; one request in this long is enough to see it come back.
LEAVE_REDIS_ALONE = timedelta(seconds=2)

CONFLICT_MESSAGE = "This id was sent before with another body; the first one counts. Use a new id for a new event."


@dataclass
class Breaker:
    """Whether this process leaves Redis alone for a moment, because it did not answer."""

    until: datetime = datetime.min.replace(tzinfo=UTC)  # noqa: RUF009  a constant

    def open(self, now: datetime) -> None:
        """Leave Redis alone from now on, for a while."""
        self.until = now + LEAVE_REDIS_ALONE

    def is_open(self, now: datetime) -> bool:
        """Whether to go to the ledger directly."""
        return now < self.until


async def receive_usage(request: Request) -> Response:
    """Take one event or an array of up to 1,000.

    202 `{"accepted", "duplicates", "rejected": [{"index", "id", "code", "message"}]}` once every accepted event is on
    disk; 422 with the same body when all were rejected. Problems: 400 no JSON, 401, 403, 413, 422 an empty array,
    429 the buffer is full, 503 nothing could be kept. After a 429, a 5xx or no answer send the same events again:
    repeats are recognised by `(source, id)`.
    """
    key = await authenticate(request, "usage:write")
    raw = await read_body(request, MAX_BODY_BYTES)
    now = datetime.now(UTC)

    events, rejections = parse_events(raw, key.source, now)
    resources: Resources = request.app.state.resources
    meters = await find_meters(request.app.state.meters, resources, {event.meter for _, event in events}, now)
    taken: list[tuple[int, UsageEvent]] = []
    for index, event in events:
        meter = meters.get(event.meter)
        if meter is None:
            rejections.append(Rejection(index, event.id, "unknown_meter", f"Stripe has no meter {event.meter!a}."))
        elif (refusal := meter.refusal()) is not None:
            rejections.append(Rejection(index, event.id, "unsupported_meter", refusal))
        else:
            taken.append((index, event))

    breaker: Breaker = request.app.state.breaker
    results = await _keep(resources, breaker, [event for _, event in taken], now) if taken else []
    rejections += [
        Rejection(index, event.id, "conflict", CONFLICT_MESSAGE)
        for (index, event), result in zip(taken, results, strict=True)
        if result == "conflict"
    ]
    rejections.sort(key=lambda rejection: rejection.index)

    numbers = Counter(results)
    for result in ("accepted", "duplicate", "conflict"):
        USAGE_EVENTS.labels(result).inc(numbers[result])
    USAGE_EVENTS.labels("rejected").inc(len(rejections) - numbers["conflict"])
    return JSONResponse(
        {
            "accepted": numbers["accepted"],
            "duplicates": numbers["duplicate"],
            "rejected": [rejection.body() for rejection in rejections],
        },
        status_code=202 if numbers["accepted"] + numbers["duplicate"] else 422,
    )


async def _keep(resources: Resources, breaker: Breaker, events: list[UsageEvent], now: datetime) -> list[str]:
    """Put the events on a disk, Redis's or PostgreSQL's; `accepted`, `duplicate` or `conflict` for each."""
    settings = resources.settings
    if breaker.is_open(now):
        return await _record_directly(resources, events)
    try:
        claims = await claim_and_append(
            resources.redis,
            events,
            now,
            dedupe_hours=settings.usage_dedupe_hours,
            max_bytes=settings.usage_buffer_max_bytes,
            replicas=settings.usage_sync_replicas,
        )
        USAGE_PATH.labels("buffer").inc()
        return list(claims)
    except BufferUnavailable as error:
        # Redis may hold the batch all the same. The ledger recognises the second copy, whichever of the two comes
        # first.
        breaker.open(now)
        log.warning("usage_goes_to_the_ledger_directly", error=str(error))
    return await _record_directly(resources, events)


async def _record_directly(resources: Resources, events: list[UsageEvent]) -> list[str]:
    try:
        async with db.transaction(resources.engine) as connection:
            recorded = await record_events(connection, events, accepted_already=False)
    except db.STORAGE_ERRORS as error:
        raise Unavailable("Usage cannot be stored right now; send it again.", retry_after_seconds=2) from error
    USAGE_PATH.labels("ledger").inc()
    return ["accepted" if result == "recorded" else result for result in recorded]
