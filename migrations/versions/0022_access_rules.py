"""Which access rules the workers follow, while some of them have read other ones (access/upkeep.py)."""

from alembic import op

revision = "0022"
down_revision = "0021"


def upgrade() -> None:
    op.execute("""
        CREATE TABLE access_rules (
            only_row    boolean PRIMARY KEY DEFAULT true CHECK (only_row),
            rules       text        NOT NULL,   -- their fingerprint, as in customer_access
            read_at     timestamptz NOT NULL,   -- when a worker read them, the last one that did
            held_until  timestamptz NOT NULL    -- until then workers with other rules, read earlier, follow none
        )
    """)
