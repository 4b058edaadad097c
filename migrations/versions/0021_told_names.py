"""Who was told that it has a name, found by an index.

When a name moves, the customer that was told last is told again. It was searched for among all who carry the name, one
by one, which takes seconds with a campaign's code that a million checkouts carry.
"""

from alembic import op

revision = "0021"
down_revision = "0020"


def upgrade() -> None:
    # What is new goes into the index at once: a list of it, as PostgreSQL keeps by default, would be read through for
    # each name. Whoever was told no name is in no need of being found.
    op.execute("""
        CREATE INDEX customer_access_announced_refs ON customer_access USING gin (announced_refs)
          WITH (fastupdate = off) WHERE announced_refs <> '{}'
    """)
