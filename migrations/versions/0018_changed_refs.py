"""Names that may have come to mean another customer, for the loop that tells those who lost or regained one.

Written beside what changed them, and taken away when everybody has been told. One name may be in it many times.
"""

from alembic import op

revision = "0018"
down_revision = "0017"


def upgrade() -> None:
    op.execute("""
        CREATE TABLE changed_refs (
            number      bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
            ref         text        NOT NULL,
            changed_at  timestamptz NOT NULL DEFAULT now()
        )
    """)
    # Who lost or regained one until now was not told.
    op.execute("""
        INSERT INTO changed_refs (ref)
        SELECT ref
          FROM (SELECT ref, id AS customer FROM customers WHERE ref IS NOT NULL
                UNION
                SELECT client_reference_id, customer FROM checkout_sessions
                UNION
                SELECT ref, customer FROM customer_links) carried
         GROUP BY ref HAVING count(*) > 1
    """)
