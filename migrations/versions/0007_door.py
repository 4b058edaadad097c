"""API keys: a limit for each, and a second secret that stays valid for a while after a key was rolled."""

from alembic import op

revision = "0007"
down_revision = "0006"

TABLES = """
-- `old_secret_sha256` is valid until `old_valid_until`; what they say before the first roll is null.
ALTER TABLE api_keys
    ADD COLUMN limit_per_second  integer CHECK (limit_per_second > 0),
    ADD COLUMN rolled_at         timestamptz,
    ADD COLUMN old_secret_sha256 bytea,
    ADD COLUMN old_valid_until   timestamptz;
"""


def upgrade() -> None:
    for statement in TABLES.split(";\n"):
        if statement.strip():
            op.execute(statement)
