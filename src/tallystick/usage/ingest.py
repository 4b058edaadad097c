"""`POST /v1/usage`, from the body to the answer: validate, claim and append in Redis, or record in the ledger directly.

    1. read     at most 1 MiB, gzip or not, from a caller whose key has `usage:write`
    2. validate each event by itself; the bad ones are reported, the good ones go on
    3. keep     claim the ids and append the batch in Redis, on disk; without Redis, commit to the ledger
    4. answer   202 with what became of each event

A crash before 3 is done leaves the caller without an answer, so it sends again; whatever had been kept is recognised.
"""

from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import structlog
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from tallystick import db
from tallystick.auth import authenticate
from tallystick.bodies import read_decoded_body
from tallystick.errors import InvalidRequest, Unavailable
from tallystick.metrics import USAGE_EVENTS, USAGE_PATH
from tallystick.resources import Resources
from tallystick.rules import MeterRules
from tallystick.usage.aggregations import NO_RULES
from tallystick.usage.buffer import BufferUnavailable, claim_and_append
from tallystick.usage.events import BadEvent, Rejection, UsageEvent
from tallystick.usage.formats import parse_events
from tallystick.usage.ledger import record_events
from tallystick.usage.meters import Meter, find_meters

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
    """Take up to 1,000 events as JSON, NDJSON or CloudEvents (docs/usage.md).

    202 `{"accepted", "duplicates", "rejected": [{"index", "id", "code", "message"}]}` once every accepted event is on
    disk; 422 with the same body when all were rejected. With `?results=all` also `"results"`, one for each event.
    Problems: 400 the body cannot be read, 401, 403, 413, 415 an unknown format or encoding, 422 no event at all,
    429 the buffer is full, 503 nothing could be kept. After a 429, a 5xx or no answer send the same events again:
    repeats are recognised by `(source, id)`.
    """
    key = await authenticate(request, "usage:write")
    if (listed := request.query_params.get("results")) not in (None, "all"):
        raise InvalidRequest("'results' may only be 'all'.", field="results")
    try:
        raw = await read_decoded_body(request, MAX_BODY_BYTES)
    except ClientDisconnect:
        return Response(status_code=400)  # it hung up before its body was here, so nobody reads this
    now = datetime.now(UTC)

    resources: Resources = request.app.state.resources
    rules = resources.rules.current(now)
    declared = {name: meter.declared for name, meter in rules.meters.items()}
    events, rejections = parse_events(raw, request.headers, key.source, now, declared)
    # Usage records have no meter at Stripe that one could ask for.
    asked = {event.meter for _, event in events if rules.meters.get(event.meter, NO_RULES).sender != "usage_records"}
    meters = await find_meters(request.app.state.meters, resources, asked, now)
    taken: list[tuple[int, UsageEvent]] = []
    for index, event in events:
        try:
            _check_meter(event, meters.get(event.meter), rules.meters.get(event.meter, NO_RULES))
        except BadEvent as bad:
            rejections.append(Rejection(index, event.id, bad.code, bad.message))
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
    answer: dict[str, object] = {
        "accepted": numbers["accepted"],
        "duplicates": numbers["duplicate"],
        "rejected": [rejection.body() for rejection in rejections],
    }
    if listed == "all":
        answer["results"] = _list_results(taken, results, rejections)
    # An empty batch of CloudEvents is valid, and nothing of it was rejected.
    all_bad = rejections and not numbers["accepted"] + numbers["duplicate"]
    return JSONResponse(answer, status_code=422 if all_bad else 202)


def _check_meter(event: UsageEvent, meter: Meter | None, rules: MeterRules) -> None:
    """Whether an event can be counted as its meter and the rules ask for. Raises `BadEvent`."""
    if rules.sender == "usage_records":
        # Stripe takes whole numbers only there, and what is rounded is billed wrongly.
        if event.value != event.value.to_integral_value():
            raise BadEvent(
                "invalid_value", f"The meter {event.meter!a} is told by usage records, which are whole numbers."
            )
    elif meter is None:
        raise BadEvent("unknown_meter", f"Stripe has no meter {event.meter!a}.")
    elif (refusal := meter.refusal(rules)) is not None:
        raise BadEvent("unsupported_meter", refusal)
    elif meter.formula == "count" and event.value != 1:
        raise BadEvent(
            "invalid_value", f"The meter {event.meter!a} counts events: leave the field 'value' out, or send 1."
        )
    if not event.properties and rules.property is None:
        return
    given = {name for name, _ in event.properties}
    if not given <= rules.declared:
        there_are = f"there are: {', '.join(sorted(rules.declared))}" if rules.declared else "it declares none"
        unknown = min(given - rules.declared)
        raise BadEvent("unknown_property", f"The meter {event.meter!a} has no property {unknown!a}; {there_are}.")
    if rules.property is not None and rules.property not in given:
        raise BadEvent(
            "missing_property", f"The meter {event.meter!a} counts the values of {rules.property!a}: send it."
        )


def _list_results(
    taken: list[tuple[int, UsageEvent]], results: list[str], rejections: list[Rejection]
) -> list[dict[str, object]]:
    """What became of each event, in the order of the request: accepted, duplicate, conflict or rejected."""
    listed: dict[int, dict[str, object]] = {
        index: {"index": index, "id": event.id, "result": result}
        for (index, event), result in zip(taken, results, strict=True)
    }
    for rejection in rejections:
        result = "conflict" if rejection.code == "conflict" else "rejected"
        listed[rejection.index] = {"result": result} | rejection.body()
    return [listed[index] for index in sorted(listed)]


async def _keep(resources: Resources, breaker: Breaker, events: list[UsageEvent], now: datetime) -> list[str]:
    """Put the events on a disk, Redis's or PostgreSQL's; `accepted`, `duplicate` or `conflict` for each."""
    settings = resources.settings
    if breaker.is_open(now):
        return await _record_directly(resources, events, now)
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
    return await _record_directly(resources, events, now)


async def _record_directly(resources: Resources, events: list[UsageEvent], now: datetime) -> list[str]:
    rules = resources.rules.current(now).meters
    try:
        async with db.transaction(resources.engine) as connection:
            recorded = await record_events(connection, events, accepted_already=False, rules=rules)
    except db.STORAGE_ERRORS as error:
        raise Unavailable("Usage cannot be stored right now; send it again.", retry_after_seconds=2) from error
    USAGE_PATH.labels("ledger").inc()
    return ["accepted" if result == "recorded" else result for result in recorded]
