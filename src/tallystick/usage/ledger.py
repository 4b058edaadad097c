"""The ledger: an event's id and its effect on the customer's total, recorded in one transaction.

Both paths end here, the drain's and the direct one, with any number of copies of an event among them. What makes a copy
harmless is the key of `usage_events`, and for events that came without a timestamp the key of `usage_stamps`.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from tallystick.metrics import LEDGER_EVENTS
from tallystick.rules import MeterRules
from tallystick.usage.aggregations import FIRST_SEAL, RECORD_ANY, list_uniques
from tallystick.usage.buckets import find_boundaries, find_bucket
from tallystick.usage.events import Key, UsageEvent, plain

Recorded = Literal["recorded", "duplicate", "conflict"]

# Returns the ids whose first copy this is. A second transaction with the same id waits here for the first one's end.
STAMP = text("""
    INSERT INTO usage_stamps (source, id, day)
    SELECT * FROM json_to_recordset(CAST(:rows AS json)) AS r(source text, id text, day date) ORDER BY source, id
    ON CONFLICT DO NOTHING
    RETURNING source, id
""")

# A total for each customer, meter and bucket that has none yet. The aggregation is what the rules, or Stripe's meter,
# say now; it stays what it was when the total was opened, and so does the property that is counted.
OPEN_TOTALS = text(f"""
    INSERT INTO usage_totals AS t (customer_ref, meter, bucket_start, bucket_end, aggregation, seal, property)
    SELECT r.customer_ref, r.meter, r.bucket_start, r.bucket_end, a.aggregation,
           {FIRST_SEAL.format(aggregation="a.aggregation")}, r.property
      FROM json_to_recordset(CAST(:rows AS json))
        AS r(customer_ref text, meter text, bucket_start timestamptz, bucket_end timestamptz, declared text,
             property text)
      LEFT JOIN (SELECT DISTINCT ON (event_name) event_name, formula FROM meters
                  WHERE formula IN ('sum', 'count', 'last')
                  ORDER BY event_name, status = 'active' DESC, refreshed_at DESC, id) m ON m.event_name = r.meter
     CROSS JOIN LATERAL (SELECT coalesce(r.declared, m.formula, 'sum') AS aggregation) a
     ORDER BY r.customer_ref, r.meter, r.bucket_start
    ON CONFLICT (customer_ref, meter, bucket_start) DO NOTHING
""")  # noqa: S608  a constant

# Locks the totals, in one order for everybody, and tells which seal is open: an event is recorded under the seal that
# will carry it. A boundary that was learnt since the bucket was opened is left to the seal, for only cutting moves what
# lies behind it. `whole`: no other boundary has cut the total, so that all events of the bucket belong to it.
LOCKED = """
    SELECT k.place, t.id, t.seal, t.aggregation, t.bucket_end, t.bucket_end >= k.bucket_end AS whole,
           k.customer_ref, k.meter
      FROM (SELECT * FROM unnest(CAST(:customer_refs AS text[]), CAST(:meters AS text[]),
                                 CAST(:bucket_starts AS timestamptz[]), CAST(:bucket_ends AS timestamptz[]))
                          WITH ORDINALITY AS k(customer_ref, meter, bucket_start, bucket_end, place)
             ORDER BY customer_ref, meter, bucket_start) k
     CROSS JOIN LATERAL (
           SELECT id, seal, aggregation, bucket_end FROM usage_totals
            WHERE customer_ref = k.customer_ref AND meter = k.meter AND bucket_start = k.bucket_start
              FOR UPDATE) t
"""
LOCK_TOTALS = text(LOCKED)

# The two halves of the one idea: the events that are new, and what they add to their totals. This is the quick form for
# whole totals that add up and events without properties; RECORD_ANY is for all, and if it is needed for one of the
# totals, nothing is inserted here. The totals are locked in the same statement, so that nobody waits for them while
# this process makes parameters. Each event says where its total and its request stand among theirs, and columns are
# cheaper than rows of JSON. Mostly all events are new: then their number says so.
RECORD = text(f"""
    WITH locked AS MATERIALIZED ({LOCKED}), inserted AS (
        INSERT INTO usage_events
               (source, id, day, customer_ref, meter, value, timestamp, stamped, received_at, total_id, seal)
        SELECT o.source, e.id, CAST(e.timestamp AT TIME ZONE 'UTC' AS date), l.customer_ref, l.meter,
               CAST(e.value AS numeric), e.timestamp, o.stamped, o.received_at, l.id, l.seal
          FROM unnest(CAST(:ids AS text[]), CAST(:values AS text[]), CAST(:timestamps AS timestamptz[]),
                      CAST(:places AS integer[]), CAST(:origins AS integer[]))
            AS e(id, value, timestamp, place, origin)
          JOIN locked l ON l.place = e.place
          JOIN unnest(CAST(:sources AS text[]), CAST(:stamped AS boolean[]), CAST(:received_at AS timestamptz[]))
               WITH ORDINALITY AS o(source, stamped, received_at, origin) ON o.origin = e.origin
         WHERE (SELECT bool_and(whole AND aggregation IN ('sum', 'count')) FROM locked)
         ORDER BY 1, 2, 3
        ON CONFLICT DO NOTHING
        RETURNING source, id, total_id, value
    ), added AS (
        UPDATE usage_totals t SET quantity = t.quantity + s.quantity, events = t.events + s.events
          FROM (SELECT total_id, sum(value) AS quantity, count(*) AS events FROM inserted GROUP BY total_id) s
         WHERE t.id = s.total_id
    )
    SELECT (SELECT bool_and(whole AND aggregation IN ('sum', 'count')) FROM locked) AS quick, count(*) AS number,
           CASE WHEN count(*) < :number THEN array_agg(source) END AS sources,
           CASE WHEN count(*) < :number THEN array_agg(id) END AS ids
      FROM inserted
""")  # noqa: S608  a constant

# A plan that is made without knowing how many events come would join them as if they were ten.
PLAN_FOR_THESE = text("SET LOCAL plan_cache_mode = force_custom_plan")

# The copies that the ledger holds of events that were not new. A stamped one lies on the day of its stamp.
FIND_COPIES = text("""
    SELECT e.source, e.id, e.customer_ref, e.meter, e.value, e.timestamp, e.stamped, e.properties
      FROM json_to_recordset(CAST(:rows AS json)) AS r(source text, id text, day date)
      LEFT JOIN usage_stamps s ON s.source = r.source AND s.id = r.id
      JOIN usage_events e ON e.source = r.source AND e.id = r.id AND e.day IN (r.day, s.day)
""")

NOTE_CONFLICTS = text("""
    INSERT INTO usage_conflicts (source, id, customer_ref, meter, value, timestamp, received_at)
    SELECT * FROM json_to_recordset(CAST(:rows AS json))
               AS r(source text, id text, customer_ref text, meter text, value numeric,
                    timestamp timestamptz, received_at timestamptz)
    ON CONFLICT DO NOTHING
""")


class _Total(NamedTuple):
    """Which total an event belongs to."""

    customer_ref: str
    meter: str
    bucket_start: datetime


async def record_events(
    connection: AsyncConnection,
    events: Sequence[UsageEvent],
    *,
    accepted_already: bool,
    rules: Mapping[str, MeterRules] = MappingProxyType({}),
) -> list[Recorded]:
    """Record each event once and add it to its total; one result for each event, in order.

    `accepted_already`: the sender was told 202 (the drain's case), so a conflict is kept in `usage_conflicts` for the
    operator. Otherwise the sender is about to hear of it. `rules`: those of the meters. The caller commits.
    """
    first_copies: dict[Key, int] = {}
    for position, event in enumerate(events):
        first_copies.setdefault(event.key, position)
    firsts = [events[position] for position in first_copies.values()]
    fresh_stamps = await _stamp(connection, [event for event in firsts if event.stamped])
    fresh = [event for event in firsts if not event.stamped or event.key in fresh_stamps]
    inserted = await _insert(connection, fresh, rules)

    if len(inserted) == len(events):
        LEDGER_EVENTS.labels("recorded").inc(len(events))
        return ["recorded"] * len(events)
    recorded = {first_copies[key] for key in inserted}
    known = await _find_copies(connection, [event for position, event in enumerate(events) if position not in recorded])
    results: list[Recorded] = []
    conflicts: list[UsageEvent] = []
    for position, event in enumerate(events):
        if position in recorded:
            results.append("recorded")
        elif not (copies := known.get(event.key)) or any(_is_same(event, copy) for copy in copies):
            # No copy at all: its stamp is remembered, its partition is past the retention and gone.
            results.append("duplicate")
        else:
            results.append("conflict")
            conflicts.append(event)
    if accepted_already and conflicts:
        await connection.execute(NOTE_CONFLICTS, {"rows": _rows(_body_row(event) for event in conflicts)})
    for result, number in Counter(results).items():
        LEDGER_EVENTS.labels(result).inc(number)
    return results


async def _stamp(connection: AsyncConnection, events: Sequence[UsageEvent]) -> set[Key]:
    if not events:
        return set()
    rows = _rows({"source": event.source, "id": event.id, "day": _day(event)} for event in events)
    stamped = await connection.execute(STAMP, {"rows": rows})
    return {(source, id) for source, id in stamped}


async def _insert(
    connection: AsyncConnection, events: Sequence[UsageEvent], rules: Mapping[str, MeterRules]
) -> set[Key]:
    """Insert the events that the ledger does not have, and add them to their totals; the keys of these events."""
    if not events:
        return set()
    ends, places = await _find_totals(connection, events)
    await _open_totals(connection, ends, rules)
    if not any(event.properties for event in events):
        inserted = await _insert_plain(connection, events, ends, places)
        if inserted is not None:
            return inserted
    return await _insert_any(connection, events, ends, places, rules)


async def _open_totals(
    connection: AsyncConnection, ends: Mapping[_Total, datetime], rules: Mapping[str, MeterRules]
) -> None:
    declared = {meter: _declared_aggregation(its_rules) for meter, its_rules in rules.items()}
    counted = {meter: its_rules.property for meter, its_rules in rules.items() if its_rules.property is not None}
    opened: list[dict[str, object]] = [
        {
            "customer_ref": total.customer_ref,
            "meter": total.meter,
            "bucket_start": total.bucket_start.isoformat(),
            "bucket_end": end.isoformat(),
            "declared": declared.get(total.meter),
            "property": counted.get(total.meter),
        }
        for total, end in ends.items()
    ]
    await connection.execute(OPEN_TOTALS, {"rows": _rows(opened)})


def _totals_to_lock(ends: Mapping[_Total, datetime]) -> dict[str, object]:
    """The parameters of LOCKED. A total's place is its number among them, from 1."""
    refs, meters, starts = zip(*ends, strict=True)
    return {
        "customer_refs": list(refs),
        "meters": list(meters),
        "bucket_starts": list(starts),
        "bucket_ends": list(ends.values()),
    }


async def _find_totals(
    connection: AsyncConnection, events: Sequence[UsageEvent]
) -> tuple[dict[_Total, datetime], list[int]]:
    """The totals of these events with the ends of their buckets, and for each event where among them its own stands."""
    times = [event.timestamp for event in events]
    boundaries = await find_boundaries(connection, (event.customer_ref for event in events), min(times), max(times))
    ends: dict[_Total, datetime] = {}
    numbers: dict[_Total, int] = {}
    places = []
    # Events of one customer and meter mostly follow each other closely, in the same bucket.
    latest: dict[tuple[str, str], tuple[datetime, datetime, int]] = {}
    for event in events:
        of = event.customer_ref, event.meter
        known = latest.get(of)
        if known is None or not known[0] <= event.timestamp < known[1]:
            start, end = find_bucket(event.timestamp, boundaries.get(event.customer_ref, ()))
            total = _Total(*of, start)
            ends.setdefault(total, end)
            known = latest[of] = start, end, numbers.setdefault(total, len(ends))
        places.append(known[2])
    return ends, places


async def _insert_plain(
    connection: AsyncConnection, events: Sequence[UsageEvent], ends: Mapping[_Total, datetime], places: list[int]
) -> set[Key] | None:
    """Insert events without properties; the keys of those that were new, or None if it needs RECORD_ANY."""
    sources, ids, _, _, values, timestamps, stamped, received, _ = zip(*events, strict=True)
    # What all events of a request have in common.
    requests = list(zip(sources, stamped, received, strict=True))
    origins = {request: place for place, request in enumerate(dict.fromkeys(requests), 1)}
    parameters = {
        **_totals_to_lock(ends),
        "ids": list(ids),
        "values": [plain(value) for value in values],
        "timestamps": list(timestamps),
        "places": places,
        "origins": [origins[request] for request in requests],
        "sources": [source for source, _, _ in origins],
        "stamped": [is_stamped for _, is_stamped, _ in origins],
        "received_at": [at for _, _, at in origins],
        "number": len(events),
    }
    await connection.execute(PLAN_FOR_THESE)
    inserted = (await connection.execute(RECORD, parameters)).one()
    if not inserted.quick:
        return None
    if inserted.number == len(events):
        return {event.key for event in events}
    return set(zip(inserted.sources or (), inserted.ids or (), strict=True))


async def _insert_any(
    connection: AsyncConnection,
    events: Sequence[UsageEvent],
    ends: dict[_Total, datetime],
    places: list[int],
    rules: Mapping[str, MeterRules],
) -> set[Key]:
    """Insert events for totals of any aggregation, and behind any cut; the keys of those that were new."""
    locked = await _lock_totals(connection, ends)
    while any(event.timestamp >= locked[place].bucket_end for event, place in zip(events, places, strict=True)):
        _go_behind_cuts(events, ends, places, locked)
        await _open_totals(connection, ends, rules)
        locked = await _lock_totals(connection, ends)
    counted = {row.id: row.meter for row in locked.values() if row.aggregation == "unique_count"}
    rows = _rows(
        _event_row(event) | {"total_id": locked[place].id, "seal": locked[place].seal}
        for event, place in zip(events, places, strict=True)
    )
    inserted = await connection.execute(RECORD_ANY, {"rows": rows, "uniques": list_uniques(counted, rules)})
    return {(source, id) for source, id in inserted}


async def _lock_totals(connection: AsyncConnection, ends: Mapping[_Total, datetime]) -> dict[int, Any]:
    return {row.place: row for row in await connection.execute(LOCK_TOTALS, _totals_to_lock(ends))}


def _go_behind_cuts(
    events: Sequence[UsageEvent], ends: dict[_Total, datetime], places: list[int], locked: Mapping[int, Any]
) -> None:
    """Give each event that lies behind the end of its total one that begins there, in `ends` and `places`.

    A total ends before its bucket when a boundary was learnt, and its total cut, after this transaction had asked for
    boundaries; or when the reference was another customer's before. What is cut stays so.
    """
    totals = list(ends)
    numbers = {total: place for place, total in enumerate(totals, 1)}
    for position, (event, place) in enumerate(zip(events, places, strict=True)):
        cut_at = locked[place].bucket_end
        if event.timestamp >= cut_at:
            total = totals[place - 1]
            behind = total._replace(bucket_start=cut_at)
            ends.setdefault(behind, ends[total])
            places[position] = numbers.setdefault(behind, len(ends))


def _declared_aggregation(rules: MeterRules) -> str | None:
    """What the rules say of a meter; None where Stripe's meter says it. Usage records add up."""
    return "sum" if rules.sender == "usage_records" else rules.aggregation


async def _find_copies(connection: AsyncConnection, events: Sequence[UsageEvent]) -> dict[Key, list[Any]]:
    if not events:
        return {}
    rows = _rows({"source": event.source, "id": event.id, "day": _day(event)} for event in events)
    found = await connection.execute(FIND_COPIES, {"rows": rows})
    copies: dict[Key, list[Any]] = {}
    for copy in found:
        copies.setdefault((copy.source, copy.id), []).append(copy)
    return copies


def _is_same(event: UsageEvent, copy: Any) -> bool:
    """Whether the sender said the same both times. A stamped time is ours, so it does not count."""
    return (event.customer_ref, event.meter, event.value, event.stamped, dict(event.properties)) == (
        copy.customer_ref,
        copy.meter,
        copy.value,
        copy.stamped,
        copy.properties or {},
    ) and (event.stamped or event.timestamp == copy.timestamp)


def _event_row(event: UsageEvent) -> dict[str, object]:
    row = _body_row(event) | {"day": _day(event), "stamped": event.stamped}
    return row | {"properties": dict(event.properties)} if event.properties else row


def _body_row(event: UsageEvent) -> dict[str, object]:
    return {
        "source": event.source,
        "id": event.id,
        "customer_ref": event.customer_ref,
        "meter": event.meter,
        "value": plain(event.value),
        "timestamp": event.timestamp.isoformat(),
        "received_at": event.received_at.isoformat(),
    }


def _day(event: UsageEvent) -> str:
    return event.timestamp.date().isoformat()


def _rows(rows: Iterable[dict[str, object]]) -> str:
    """Rows as one JSON parameter for `json_to_recordset`; quantities go as strings."""
    return json.dumps(list(rows))
