"""The order of marks is written twice, for Python and for PostgreSQL. Both must say the same."""

import json
from datetime import UTC, datetime, timedelta

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import text

from tallystick import db
from tallystick.mirror.marks import CREATED, FINAL, NEVER, STUB, UPDATED, Mark, ties_with, wins_over
from tallystick.resources import Resources

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)

marks = st.builds(
    Mark,
    deleted=st.booleans(),
    created=st.integers(0, 2).map(lambda seconds: NOON + timedelta(seconds=seconds)) | st.just(NEVER),
    rank=st.sampled_from((CREATED, UPDATED, FINAL)),
    event=st.sampled_from(("", "evt_a", "evt_B", "evt_b", "evt_1", "evt_é", "evt-_", "EVT_a")),
)

COMPARE = text(f"""
    WITH marks AS (
        SELECT * FROM json_to_recordset(CAST(:rows AS json))
            AS r(n integer, deleted boolean, mark_created timestamptz, mark_rank smallint, mark_event text)
    )
    SELECT one.n, other.n, {wins_over("one", "other")}, {ties_with("one", "other")} FROM marks one, marks other
""")  # noqa: S608  the fragments under test


@given(st.lists(marks, min_size=2, max_size=12))
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_python_and_postgresql_order_marks_alike(resources: Resources, drawn: list[Mark]) -> None:
    rows = [
        {
            "n": number,
            "deleted": mark.deleted,
            "mark_created": "-infinity" if mark.created == NEVER else mark.created.isoformat(),
            "mark_rank": mark.rank,
            "mark_event": mark.event,
        }
        for number, mark in enumerate(drawn)
    ]

    async with db.transaction(resources.engine) as connection:
        compared = (await connection.execute(COMPARE, {"rows": json.dumps(rows)})).all()

    for one, other, wins, ties in compared:
        assert wins is (drawn[one].order > drawn[other].order), (drawn[one], drawn[other])
        assert ties is drawn[one].ties_with(drawn[other]), (drawn[one], drawn[other])


def test_the_order_does_not_depend_on_the_database_s_collation() -> None:
    # The embedded PostgreSQL has no collation that sorts otherwise than Python does; a production database may.
    assert wins_over("one", "other").count('mark_event COLLATE "C"') == 2


@given(marks)
def test_every_event_beats_a_stub(mark: Mark) -> None:
    if mark.event:
        assert mark.order > STUB.order
