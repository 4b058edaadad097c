"""Corrections: why one is proposed, and the tries of those that are to be cancelled at Stripe."""

from alembic import op

revision = "0009"
down_revision = "0008"

TABLES = """
-- `why`: why it is left to an operator. `attempts`: how often Stripe was asked to cancel; `next_attempt_at` also keeps
-- other workers off while one asks.
ALTER TABLE usage_corrections
    ADD COLUMN why              text,
    ADD COLUMN attempts         integer     NOT NULL DEFAULT 0,
    ADD COLUMN next_attempt_at  timestamptz NOT NULL DEFAULT '-infinity';
"""


def upgrade() -> None:
    for statement in TABLES.split(";\n"):
        if statement.strip():
            op.execute(statement)
