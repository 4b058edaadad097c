"""Repair: how far Stripe's event list has been read, and how far the mirror has been filled from Stripe's API."""

from alembic import op

revision = "0003"
down_revision = "0002"

TABLES = """
-- How far Stripe's event list has been read: one row. A pass goes from the newest event back to where the pass before
-- began; what a crash interrupts goes on at its cursor.
CREATE TABLE event_recovery (
    only_row         boolean PRIMARY KEY DEFAULT true CHECK (only_row),
    complete_until   timestamptz,            -- every handled event created until then is recorded
    newest_event     timestamptz,            -- Stripe's newest event before the last complete pass, on Stripe's clock
    types            text,                   -- which event types that pass looked for, as a hash
    gap_from         timestamptz,            -- events from then …
    gap_until        timestamptz,            -- … until then were no longer listed when they were looked for
    pass_started_at  timestamptz,            -- null: no pass is under way
    pass_since       timestamptz,            -- the pass goes back to here; null: to the end of the list
    pass_newest      timestamptz,
    pass_types       text,
    pass_group       integer     NOT NULL DEFAULT 0,   -- the types are listed twenty at a time
    pass_cursor      text,                   -- the last event of that group that was looked at
    pass_failed      boolean     NOT NULL DEFAULT false,
    leased_by        text,
    leased_until     timestamptz NOT NULL DEFAULT '-infinity'
);

-- The filling of the mirror from Stripe's API that is under way, or was the last: one row.
CREATE TABLE mirror_sync (
    only_row      boolean PRIMARY KEY DEFAULT true CHECK (only_row),
    all_invoices  boolean     NOT NULL,
    started_at    timestamptz NOT NULL,
    finished_at   timestamptz
);

-- Its lists, and how far each has been read.
CREATE TABLE mirror_sync_lists (
    name         text PRIMARY KEY,
    cursor       text,
    objects      bigint      NOT NULL DEFAULT 0,
    finished_at  timestamptz
);
"""


def upgrade() -> None:
    for statement in TABLES.split(";\n"):
        if statement.strip():
            op.execute(statement)
