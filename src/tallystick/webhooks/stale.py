"""Stale events: each is noted with the event that it lost to, whose mark its object's row has."""

import json
from collections.abc import Mapping

from sqlalchemy import text

from tallystick import db
from tallystick.mirror.changes import AnyChange
from tallystick.mirror.statements import TABLES

MARKS = " UNION ALL ".join(
    f"SELECT '{table}' AS kind, id, mark_event FROM {table}"  # noqa: S608  names from the mirror's table of tables
    for table, _ in TABLES.values()
)

NOTE_STALE = text(f"""
    UPDATE stripe_events e
       SET verdict = 'stale',
           superseded_by = (SELECT nullif(m.mark_event, '') FROM ({MARKS}) m WHERE m.kind = w.kind AND m.id = w.object)
      FROM json_to_recordset(CAST(:rows AS json)) AS w(event text, kind text, object text)
     WHERE e.id = w.event
""")  # noqa: S608  names from the mirror's table of tables


async def note_stale(connection: db.Connection, changes: Mapping[str, AnyChange]) -> None:
    """Give the recorded events, by their ids and the changes that they did not make, the verdict `stale`."""
    rows = [
        {"event": event, "kind": TABLES[type(change)][0], "object": change.id}
        for event, change in sorted(changes.items())
    ]
    if rows:
        await connection.execute(NOTE_STALE, {"rows": json.dumps(rows)})
