"""Usage records that were refused after a try without an answer: parked with the reason, for they may be said again.

Nothing ever settled them as `outcome_unknown`: Stripe has no summaries of them that could.
"""

from alembic import op

revision = "0015"
down_revision = "0014"


def upgrade() -> None:
    op.execute("""
        UPDATE usage_deliveries d
           SET reason = coalesce((SELECT a.reason FROM usage_delivery_attempts a
                                   WHERE a.delivery_id = d.id AND a.outcome = 'parked' AND a.reason IS NOT NULL
                                   ORDER BY a.attempt DESC LIMIT 1), d.reason)
         WHERE d.state = 'parked' AND d.reason = 'outcome_unknown' AND d.sender = 'usage_records'
    """)
