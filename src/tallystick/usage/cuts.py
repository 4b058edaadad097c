"""Cuts: a total whose bucket turned out to span a period's boundary becomes two, before it is sealed.

Only events of the open seal can move. What is sealed stays where it was told to be.
"""

from collections.abc import Mapping, Sequence

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from tallystick.rules import MeterRules
from tallystick.usage.aggregations import FIRST_SEAL, compute_totals
from tallystick.usage.parts import Total

FIND_CUTS = text("""
    SELECT t.id, b.at
      FROM unnest(CAST(:totals AS bigint[]), CAST(:customers AS text[]), CAST(:starts AS timestamptz[]),
                  CAST(:ends AS timestamptz[])) AS t(id, customer, bucket_start, bucket_end)
      JOIN period_boundaries b ON b.customer = t.customer AND b.at > t.bucket_start AND b.at < t.bucket_end
     ORDER BY t.id, b.at DESC
""")

OPEN_CUT = text(f"""
    INSERT INTO usage_totals AS t (customer_ref, meter, bucket_start, bucket_end, aggregation, seal, property)
    SELECT customer_ref, meter, :at, bucket_end, aggregation, {FIRST_SEAL.format(aggregation="aggregation")}, property
      FROM usage_totals WHERE id = :total
    ON CONFLICT (customer_ref, meter, bucket_start) DO UPDATE SET bucket_end = t.bucket_end
    RETURNING id, seal
""")  # noqa: S608  a constant

# A statement has a few seconds, and an hour may have millions of events.
MOVED_AT_ONCE = 20_000

MOVE_EVENTS = text("""
    WITH moved AS (
        UPDATE usage_events e SET total_id = :new_total, seal = :new_seal
          FROM (SELECT source, id, day FROM usage_events
                 WHERE total_id = :total AND seal = :seal AND timestamp >= :at
                   AND day BETWEEN CAST(:first_day AS date) AND CAST(:last_day AS date)
                 LIMIT :most) m
         WHERE e.source = m.source AND e.id = m.id AND e.day = m.day
        RETURNING e.value
    ), sums AS (SELECT coalesce(sum(value), 0) AS quantity, count(*) AS events FROM moved)
    UPDATE usage_totals t
       SET quantity = t.quantity + CASE t.id WHEN :total THEN -sums.quantity ELSE sums.quantity END,
           events = t.events + CASE t.id WHEN :total THEN -sums.events ELSE sums.events END,
           bucket_end = CASE t.id WHEN :total THEN :at ELSE t.bucket_end END
      FROM sums WHERE t.id IN (:total, :new_total)
    RETURNING sums.events
""")


async def cut_totals(connection: AsyncConnection, totals: Sequence[Total], rules: Mapping[str, MeterRules]) -> bool:
    """Cut locked totals at boundaries that were learnt after their buckets were opened; whether there were any."""
    buckets = {
        "totals": [total.id for total in totals],
        "customers": [total.customer for total in totals],
        "starts": [total.bucket_start for total in totals],
        "ends": [total.bucket_end for total in totals],
    }
    cuts = (await connection.execute(FIND_CUTS, buckets)).all()
    by_id = {total.id: total for total in totals}
    changed: dict[int, str] = {}
    for total_id, at in cuts:
        total = by_id[total_id]
        new_total, new_seal = (await connection.execute(OPEN_CUT, {"total": total_id, "at": at})).one()
        wanted = {
            "total": total_id,
            "seal": total.seal,
            "new_total": new_total,
            "new_seal": new_seal,
            "at": at,
            "first_day": total.bucket_start.date(),
            "last_day": total.bucket_end.date(),
            "most": MOVED_AT_ONCE,
        }
        while await connection.scalar(MOVE_EVENTS, wanted) == MOVED_AT_ONCE:
            pass
        changed |= {total_id: total.meter, new_total: total.meter}
    if changed:
        await compute_totals(connection, changed, rules)
    return bool(cuts)
