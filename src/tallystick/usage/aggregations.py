"""What a total's quantity is under each aggregation: added to with new events, or computed anew from all of them.

    sum, count      the sum of the events' values (1 each, for `count`)
    last            the value of the latest event: by timestamp, then by when it was received, then by source and id
    max             the greatest value
    unique_count    how many different values a property had

`usage_totals.aggregation` says which one a total has had since it was opened. `last_key` orders events of one instant,
byte by byte ("C"): no part of it can run into the next, for none has control characters.
"""

import json
from collections.abc import Mapping
from typing import Literal

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from tallystick.rules import MeterRules

Aggregation = Literal["sum", "count", "last", "max", "unique_count"]
ADDITIVE = frozenset({"sum", "count"})

NO_RULES = MeterRules()

# The number of a total's open seal. What is sealed has smaller ones: a `count` total has one for each sealed event, and
# those that stay open need not be written anew.
COUNTED_OPEN_SEAL = 1_000_000_000
FIRST_SEAL = f"CASE {{aggregation}} WHEN 'count' THEN {COUNTED_OPEN_SEAL} ELSE 1 END"

# Which property's values a total counts: its own, or what the rules say now of one that was opened before it had one.
COUNTED_IN = """
    SELECT t.id AS total_id, coalesce(t.property, r.property) AS property
      FROM json_to_recordset(CAST(:uniques AS json)) AS r(total_id bigint, property text)
      JOIN usage_totals t ON t.id = r.total_id AND t.aggregation = 'unique_count'
"""

# Events of any kind, and what the new ones among them add to their totals, which are locked. Of a counted value 16
# bytes of a hash are kept: among 10⁹ values, two share them with a chance of 10⁻²⁰.
RECORD_ANY = text(f"""
    WITH inserted AS (
        INSERT INTO usage_events
               (source, id, day, customer_ref, meter, value, timestamp, stamped, received_at, total_id, seal,
                properties)
        SELECT * FROM json_to_recordset(CAST(:rows AS json))
                   AS r(source text, id text, day date, customer_ref text, meter text, value numeric,
                        timestamp timestamptz, stamped boolean, received_at timestamptz, total_id bigint, seal integer,
                        properties jsonb)
         ORDER BY source, id, day
        ON CONFLICT DO NOTHING
        RETURNING source, id, total_id, value, timestamp, properties,
                  to_char(received_at AT TIME ZONE 'UTC', 'YYYYMMDDHH24MISSUS')
                  || chr(1) || source || chr(1) || id COLLATE "C" AS key
    ), counted AS (
        INSERT INTO usage_uniques (total_id, digest)
        SELECT DISTINCT total_id, substring(sha256(convert_to(i.properties ->> u.property, 'UTF8')) FROM 1 FOR 16)
          FROM inserted i JOIN ({COUNTED_IN}) u USING (total_id)
         WHERE i.properties ? u.property
        ON CONFLICT DO NOTHING
        RETURNING total_id
    ), grouped AS (
        INSERT INTO usage_group_totals AS g (total_id, property, value, quantity, events)
        SELECT i.total_id, p.key, p.value, sum(i.value), count(*)
          FROM inserted i
          JOIN usage_totals t ON t.id = i.total_id AND t.aggregation IN ('sum', 'count')
         CROSS JOIN LATERAL jsonb_each_text(i.properties) p
         GROUP BY 1, 2, 3
        ON CONFLICT (total_id, property, value) DO UPDATE
           SET quantity = g.quantity + excluded.quantity, events = g.events + excluded.events
    ), parts AS (
        SELECT i.total_id, sum(i.value) AS quantity, count(*) AS events, max(i.value) AS greatest,
               max(i.timestamp) AS last_at,
               (array_agg(i.value ORDER BY i.timestamp DESC, i.key DESC))[1] AS latest,
               (array_agg(i.key ORDER BY i.timestamp DESC, i.key DESC))[1] AS last_key,
               (SELECT count(*) FROM counted c WHERE c.total_id = i.total_id) AS uniques
          FROM inserted i
         GROUP BY i.total_id
    ), compared AS (
        SELECT p.*, t.aggregation = 'last' AND (t.last_at IS NULL
                    OR (p.last_at, p.last_key) > (t.last_at, t.last_key COLLATE "C")) AS newer
          FROM parts p JOIN usage_totals t ON t.id = p.total_id
    ), added AS (
        UPDATE usage_totals t
           SET events = t.events + p.events,
               quantity = CASE t.aggregation
                          WHEN 'last' THEN CASE WHEN p.newer THEN p.latest ELSE t.quantity END
                          WHEN 'max' THEN greatest(p.greatest, CASE WHEN t.events > 0 THEN t.quantity END)
                          WHEN 'unique_count' THEN t.quantity + p.uniques
                          ELSE t.quantity + p.quantity END,
               last_at = CASE WHEN p.newer THEN p.last_at ELSE t.last_at END,
               last_key = CASE WHEN p.newer THEN p.last_key ELSE t.last_key END
          FROM compared p WHERE t.id = p.total_id
    )
    SELECT source, id FROM inserted
""")  # noqa: S608  a constant

# Computed anew from their events; those below seal 1 were voided (usage/corrections.py) and count no more.
FORGET_UNIQUES = text("DELETE FROM usage_uniques WHERE total_id = ANY(:totals)")
FORGET_GROUPS = text("DELETE FROM usage_group_totals WHERE total_id = ANY(:totals)")

COUNT_UNIQUES = text(f"""
    INSERT INTO usage_uniques (total_id, digest)
    SELECT DISTINCT e.total_id, substring(sha256(convert_to(e.properties ->> u.property, 'UTF8')) FROM 1 FOR 16)
      FROM usage_events e JOIN ({COUNTED_IN}) u USING (total_id)
     WHERE e.properties ? u.property AND e.total_id = ANY(:totals) AND e.seal > 0
""")  # noqa: S608  a constant

ADD_UP_GROUPS = text("""
    INSERT INTO usage_group_totals (total_id, property, value, quantity, events)
    SELECT e.total_id, p.key, p.value, sum(e.value), count(*)
      FROM usage_events e
      JOIN usage_totals t ON t.id = e.total_id AND t.aggregation IN ('sum', 'count')
     CROSS JOIN LATERAL jsonb_each_text(e.properties) p
     WHERE e.total_id = ANY(:totals) AND e.seal > 0
     GROUP BY 1, 2, 3
""")

COMPUTE = text("""
    UPDATE usage_totals t
       SET quantity = CASE t.aggregation
                      WHEN 'last' THEN coalesce(s.latest, 0)
                      WHEN 'max' THEN coalesce(s.greatest, 0)
                      ELSE (SELECT count(*) FROM usage_uniques u WHERE u.total_id = t.id) END,
           last_at = CASE WHEN t.aggregation = 'last' THEN s.last_at END,
           last_key = CASE WHEN t.aggregation = 'last' THEN s.last_key END
      FROM usage_totals o
      LEFT JOIN (
           SELECT total_id, max(value) AS greatest, max(timestamp) AS last_at,
                  (array_agg(value ORDER BY timestamp DESC, key DESC))[1] AS latest,
                  (array_agg(key ORDER BY timestamp DESC, key DESC))[1] AS last_key
             FROM (SELECT total_id, value, timestamp,
                          to_char(received_at AT TIME ZONE 'UTC', 'YYYYMMDDHH24MISSUS')
                          || chr(1) || source || chr(1) || id COLLATE "C" AS key
                     FROM usage_events WHERE total_id = ANY(:totals) AND seal > 0) e
            GROUP BY total_id) s ON s.total_id = o.id
     WHERE o.id = ANY(:totals) AND t.id = o.id AND t.aggregation NOT IN ('sum', 'count')
""")


def list_uniques(totals: Mapping[int, str], rules: Mapping[str, MeterRules]) -> str:
    """What the rules have counted in each total, for the statements here; `totals` maps ids to meters."""
    return json.dumps(
        [{"total_id": id, "property": rules.get(meter, NO_RULES).property} for id, meter in totals.items()]
    )


async def compute_totals(
    connection: AsyncConnection, totals: Mapping[int, str], rules: Mapping[str, MeterRules]
) -> None:
    """Compute locked totals anew from their events: groups, uniques, and the quantities that do not add up.

    `totals` maps ids to meters. What adds up is left as it is: whoever moved the events has moved it with them.
    """
    ids = list(totals)
    await connection.execute(FORGET_UNIQUES, {"totals": ids})
    await connection.execute(FORGET_GROUPS, {"totals": ids})
    await connection.execute(ADD_UP_GROUPS, {"totals": ids})
    await connection.execute(COUNT_UNIQUES, {"totals": ids, "uniques": list_uniques(totals, rules)})
    await connection.execute(COMPUTE, {"totals": ids})
