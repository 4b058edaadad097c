"""Which property's values a total counts: that of the rules when it was opened, whatever they say since.

Totals that were opened before have none, and count what the rules say.
"""

from alembic import op

revision = "0017"
down_revision = "0016"


def upgrade() -> None:
    op.execute("ALTER TABLE usage_totals ADD COLUMN property text")
