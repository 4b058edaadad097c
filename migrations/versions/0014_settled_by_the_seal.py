"""When a delivery was settled that the seal itself parked or voided: when it was written down."""

from alembic import op

revision = "0014"
down_revision = "0013"


def upgrade() -> None:
    op.execute("""
        UPDATE usage_deliveries SET settled_at = created_at
         WHERE settled_at IS NULL AND state IN ('parked', 'voided')
    """)
