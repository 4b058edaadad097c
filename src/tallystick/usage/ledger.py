"""The ledger: an event's id and its effect on the customer's total, recorded in one transaction.

Both paths end here, the drain's and the direct one, with any number of copies of an event among them. What makes a copy
harmless is the key of `usage_events`, and for events that came without a timestamp the key of `usage_stamps`.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from types import MappingProxyType
from typing import Any, Literal

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from tallystick.metrics import LEDGER_EVENTS
from tallystick.rules import MeterRules
from tallystick.usage.aggregations import ADDITIVE, RECORD_ANY, list_uniques
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

# Locks the totals, in one order for everybody, and tells which seal is open: an event is recorded under the seal that
# will carry it. The update changes nothing: it locks. A boundary that was learnt since the bucket was opened is left to
# the seal, for only cutting moves what lies behind it. The aggregation is what the rules, or Stripe's meter, said when
# the total was opened.
LOCK_TOTALS = text("""
    INSERT INTO usage_totals AS t (customer_ref, meter, bucket_start, bucket_end, aggregation)
    SELECT r.customer_ref, r.meter, r.bucket_start, r.bucket_end, coalesce(r.declared, m.formula, 'sum')
      FROM json_to_recordset(CAST(:rows AS json))
        AS r(customer_ref text, meter text, bucket_start timestamptz, bucket_end timestamptz, declared text)
      LEFT JOIN (SELECT DISTINCT ON (event_name) event_name, formula FROM meters
                  WHERE formula IN ('sum', 'count', 'last')
                  ORDER BY event_name, status = 'active' DESC, refreshed_at DESC, id) m ON m.event_name = r.meter
     ORDER BY r.customer_ref, r.meter, r.bucket_start
    ON CONFLICT (customer_ref, meter, bucket_start) DO UPDATE SET bucket_end = t.bucket_end
    RETURNING t.customer_ref, t.meter, t.bucket_start, t.id, t.seal, t.aggregation
""")

# The two halves of the one idea: the events that are new, and what they add to their totals. This is the quick form for
# totals that add up and events without properties; RECORD_ANY is the whole one.
RECORD = text("""
    WITH inserted AS (
        INSERT INTO usage_events
               (source, id, day, customer_ref, meter, value, timestamp, stamped, received_at, total_id, seal)
        SELECT * FROM json_to_recordset(CAST(:rows AS json))
                   AS r(source text, id text, day date, customer_ref text, meter text, value numeric,
                        timestamp timestamptz, stamped boolean, received_at timestamptz, total_id bigint, seal integer)
         ORDER BY source, id, day
        ON CONFLICT DO NOTHING
        RETURNING source, id, total_id, value
    ), added AS (
        UPDATE usage_totals t SET quantity = t.quantity + s.quantity, events = t.events + s.events
          FROM (SELECT total_id, sum(value) AS quantity, count(*) AS events FROM inserted GROUP BY total_id) s
         WHERE t.id = s.total_id
    )
    SELECT source, id FROM inserted
""")

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
    if not events:
        return set()
    times = [event.timestamp for event in events]
    boundaries = await find_boundaries(connection, (event.customer_ref for event in events), min(times), max(times))
    buckets = [find_bucket(event.timestamp, boundaries.get(event.customer_ref, ())) for event in events]
    ends: dict[tuple[str, str, datetime], datetime] = {}
    for event, (start, end) in zip(events, buckets, strict=True):
        ends[(event.customer_ref, event.meter, start)] = end
    declared = {meter: _declared_aggregation(its_rules) for meter, its_rules in rules.items()}
    locked = await connection.execute(
        LOCK_TOTALS,
        {
            "rows": _rows(
                {
                    "customer_ref": ref,
                    "meter": meter,
                    "bucket_start": start.isoformat(),
                    "bucket_end": end.isoformat(),
                    "declared": declared.get(meter),
                }
                for (ref, meter, start), end in ends.items()
            )
        },
    )
    totals = {(ref, meter, start): total for ref, meter, start, *total in locked}
    rows = []
    for event, (start, _) in zip(events, buckets, strict=True):
        total_id, seal, _ = totals[(event.customer_ref, event.meter, start)]
        rows.append(_event_row(event) | {"total_id": total_id, "seal": seal})
    plain_sums = all(aggregation in ADDITIVE for _, _, aggregation in totals.values())
    if plain_sums and not any(event.properties for event in events):
        inserted = await connection.execute(RECORD, {"rows": _rows(rows)})
    else:
        counted = {
            total_id: meter
            for (_, meter, _), (total_id, _, aggregation) in totals.items()
            if aggregation == "unique_count"
        }
        parameters = {"rows": _rows(rows), "uniques": list_uniques(counted, rules)}
        inserted = await connection.execute(RECORD_ANY, parameters)
    return {(source, id) for source, id in inserted}


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
