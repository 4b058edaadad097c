"""`POST /v1/usage`, from the body to the answer: validate, claim and append in Redis, or record in the ledger directly.

    1. read     at most 1 MiB, gzip or not, from a caller whose key has `usage:write`
    2. validate each event by itself; the bad ones are reported, the good ones go on
    3. keep     claim the ids and append the batch in Redis, on disk; without Redis, commit to the ledger
    4. answer   202 with what became of each event

A crash before 3 is done leaves the caller without an answer, so it sends again; whatever had been kept is recognised.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from time import monotonic_ns

import msgspec
import structlog
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from tallystick import db
from tallystick.auth import authenticate
from tallystick.bodies import read_decoded_body
from tallystick.errors import InvalidRequest, Unavailable
from tallystick.metrics import USAGE_EVENTS, USAGE_PATH
from tallystick.resources import Resources
from tallystick.rules import MeterRules
from tallystick.usage.aggregations import NO_RULES
from tallystick.usage.buffer import Buffer, BufferUnavailable
from tallystick.usage.events import BadEvent, Rejection, UsageEvent
from tallystick.usage.formats import parse_events
from tallystick.usage.ledger import record_events
from tallystick.usage.meters import Meter, find_meters

log = structlog.get_logger()

MAX_BODY_BYTES = 1024 * 1024

# A Redis that does not answer costs each request its time-out; one request in this long is enough to see it come back.
LEAVE_REDIS_ALONE_NS = 2 * 10**9

# Finding a labelled counter costs more than adding to it.
COUNTERS = {result: USAGE_EVENTS.labels(result) for result in ("accepted", "duplicate", "conflict")}
REJECTED = USAGE_EVENTS.labels("rejected")
BY_BUFFER, BY_LEDGER = USAGE_PATH.labels("buffer"), USAGE_PATH.labels("ledger")

CONFLICT_MESSAGE = "This id was sent before with another body; the first one counts. Use a new id for a new event."


@dataclass
class Breaker:
    """Whether this process leaves Redis alone for a moment, because it did not answer."""

    until: int = 0  # of `monotonic_ns`

    def open(self) -> None:
        """Leave Redis alone from now on, for a while: counted from the end of the call that it did not answer."""
        self.until = monotonic_ns() + LEAVE_REDIS_ALONE_NS

    def is_open(self) -> bool:
        """Whether to go to the ledger directly."""
        return monotonic_ns() < self.until


async def receive_usage(request: Request) -> Response:
    """Take up to 1,000 events as JSON, NDJSON or CloudEvents (docs/usage.md).

    202 `{"accepted", "duplicates", "rejected": [{"index", "id", "code", "message"}]}` once every accepted event is on
    disk; 422 with the same body when all were rejected. With `?results=all` also `"results"`, one for each event.
    Problems: 400 the body cannot be read, 401, 403, 413, 415 an unknown format or encoding, 422 no event at all,
    429 the buffer is full, 503 nothing could be kept. After a 429, a 5xx or no answer send the same events again:
    repeats are recognised by `(source, id)`.
    """
    key = await authenticate(request, "usage:write")
    listed = request.query_params.get("results") if request.scope["query_string"] else None
    if listed not in (None, "all"):
        raise InvalidRequest("'results' may only be 'all'.", field="results")
    try:
        raw = await read_decoded_body(request, MAX_BODY_BYTES, request.app.state.arriving_usage)
    except ClientDisconnect:
        return Response(status_code=400)  # it hung up before its body was here, so nobody reads this
    now = datetime.now(UTC)

    resources: Resources = request.app.state.resources
    rules = resources.rules.current(now)
    declared = {name: meter.declared for name, meter in rules.meters.items()}
    events, rejections = parse_events(raw, request.headers, key.source, now, declared)
    # Usage records have no meter at Stripe that one could ask for.
    names = {event.meter for _, event in events}
    asked = {name for name in names if rules.meters.get(name, NO_RULES).sender != "usage_records"}
    meters = await find_meters(request.app.state.meters, resources, asked, now)
    checks = {name: MeterCheck(name, meters.get(name), rules.meters.get(name, NO_RULES)) for name in names}
    taken: list[tuple[int, UsageEvent]] = []
    for index, event in events:
        try:
            checks[event.meter].check(event)
        except BadEvent as bad:
            rejections.append(Rejection(index, event.id, bad.code, bad.message))
        else:
            taken.append((index, event))

    results = await _keep(request, [event for _, event in taken], now) if taken else []
    numbers = Counter(results)
    if numbers["conflict"]:
        rejections += [
            Rejection(index, event.id, "conflict", CONFLICT_MESSAGE)
            for (index, event), result in zip(taken, results, strict=True)
            if result == "conflict"
        ]
    rejections.sort(key=lambda rejection: rejection.index)

    for result, counter in COUNTERS.items():
        if number := numbers[result]:
            counter.inc(number)
    if refused := len(rejections) - numbers["conflict"]:
        REJECTED.inc(refused)
    answer: dict[str, object] = {
        "accepted": numbers["accepted"],
        "duplicates": numbers["duplicate"],
        "rejected": [rejection.body() for rejection in rejections],
    }
    if listed == "all":
        answer["results"] = _list_results(taken, results, rejections)
    # An empty batch of CloudEvents is valid, and nothing of it was rejected.
    all_bad = rejections and not numbers["accepted"] + numbers["duplicate"]
    return Response(msgspec.json.encode(answer), 422 if all_bad else 202, media_type="application/json")


class MeterCheck:
    """Whether events of one meter can be counted as it and its rules ask for; what all have in common is asked once."""

    def __init__(self, name: str, meter: Meter | None, rules: MeterRules) -> None:
        self.name, self.rules = name, rules
        self.recorded = rules.sender == "usage_records"
        self.counted = not self.recorded and meter is not None and meter.formula == "count"
        self.refusal: tuple[str, str] | None = None
        if not self.recorded:
            if meter is None:
                self.refusal = "unknown_meter", f"Stripe has no meter {name!a}."
            elif (refusal := meter.refusal(rules)) is not None:
                self.refusal = "unsupported_meter", refusal

    def check(self, event: UsageEvent) -> None:
        """Raise `BadEvent` for an event that cannot be counted."""
        if self.refusal is not None:
            raise BadEvent(*self.refusal)
        # Stripe takes whole numbers only as usage records, and what is rounded is billed wrongly.
        if self.recorded and event.value != event.value.to_integral_value():
            raise BadEvent(
                "invalid_value", f"The meter {self.name!a} is told by usage records, which are whole numbers."
            )
        if self.counted and event.value != 1:
            raise BadEvent(
                "invalid_value", f"The meter {self.name!a} counts events: leave the field 'value' out, or send 1."
            )
        if event.properties or self.rules.property is not None:
            self._check_properties({name for name, _ in event.properties})

    def _check_properties(self, given: set[str]) -> None:
        rules = self.rules
        if not given <= rules.declared:
            there_are = f"there are: {', '.join(sorted(rules.declared))}" if rules.declared else "it declares none"
            unknown = min(given - rules.declared)
            raise BadEvent("unknown_property", f"The meter {self.name!a} has no property {unknown!a}; {there_are}.")
        if rules.property is not None and rules.property not in given:
            raise BadEvent(
                "missing_property", f"The meter {self.name!a} counts the values of {rules.property!a}: send it."
            )


def _list_results(
    taken: list[tuple[int, UsageEvent]], results: Sequence[str], rejections: list[Rejection]
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


async def _keep(request: Request, events: list[UsageEvent], now: datetime) -> Sequence[str]:
    """Put the events on a disk, Redis's or PostgreSQL's; `accepted`, `duplicate` or `conflict` for each."""
    resources: Resources = request.app.state.resources
    buffer: Buffer = request.app.state.buffer
    breaker: Breaker = request.app.state.breaker
    if breaker.is_open():
        return await _record_directly(resources, events, now)
    try:
        claims = await buffer.append(events, now)
    except BufferUnavailable as error:
        # Redis may hold the batch all the same. The ledger recognises the second copy, whichever of the two comes
        # first.
        breaker.open()
        log.warning("usage_goes_to_the_ledger_directly", error=str(error))
        return await _record_directly(resources, events, now)
    BY_BUFFER.inc()
    return claims


async def _record_directly(resources: Resources, events: list[UsageEvent], now: datetime) -> list[str]:
    rules = resources.rules.current(now).meters
    try:
        async with db.transaction(resources.engine) as connection:
            recorded = await record_events(connection, events, accepted_already=False, rules=rules)
    except db.STORAGE_ERRORS as error:
        raise Unavailable("Usage cannot be stored right now; send it again.", retry_after_seconds=2) from error
    BY_LEDGER.inc()
    return ["accepted" if result == "recorded" else result for result in recorded]
