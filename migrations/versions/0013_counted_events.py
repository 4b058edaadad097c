"""The open seal of a `count` total has a number above those of its sealed events (usage/aggregations.py).

So its open events need not be numbered anew each time that some of them are sealed.
"""

from alembic import op

revision = "0013"
down_revision = "0012"

OPEN_SEAL = 1_000_000_000


def upgrade() -> None:
    op.execute(f"""
        UPDATE usage_events e SET seal = {OPEN_SEAL}
          FROM usage_totals t
         WHERE t.aggregation = 'count' AND t.events <> t.sealed_events AND e.total_id = t.id AND e.seal = t.seal
    """)
    op.execute(f"UPDATE usage_totals SET seal = {OPEN_SEAL} WHERE aggregation = 'count'")
