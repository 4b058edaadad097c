"""Thresholds: what is to be looked at is written down, so that nothing is missed while nobody looks."""

from alembic import op

revision = "0016"
down_revision = "0015"

TABLES = """
-- The meters with thresholds, and which: what it was when all that is running was last to be looked at.
CREATE TABLE usage_threshold_meters (
    meter     text PRIMARY KEY,
    declared  text NOT NULL
);

-- Usage to be looked at: that of a total which was sealed, written with the seal; and of everybody, after a change of
-- what is declared. `at`: an instant of the period in question. What is not sealed is found without a row here.
CREATE TABLE usage_threshold_looks (
    id            bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    customer_ref  text        NOT NULL,
    meter         text        NOT NULL,
    at            timestamptz NOT NULL
);
"""


def upgrade() -> None:
    for statement in TABLES.split(";\n"):
        if statement.strip():
            op.execute(statement)
