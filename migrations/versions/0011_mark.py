"""The mark by which a restored database is noticed (usage/restored.py)."""

from alembic import op

revision = "0011"
down_revision = "0010"


def upgrade() -> None:
    op.execute("ALTER TABLE installation ADD COLUMN mark bigint NOT NULL DEFAULT 0")
