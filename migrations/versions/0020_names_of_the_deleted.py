"""A deleted customer keeps the name in its metadata only while nobody has it by a checkout either.

Until now only other customers' metadata took it away. The deleted customer's last notification could then name, with
no access, somebody who has access.
"""

from alembic import op

revision = "0020"
down_revision = "0019"

VIEW = """
-- The product's own names of each customer, from the customer's side (see customer_references for the other side). A
-- deleted customer keeps its name until another one takes it. (OFFSET 0, and the newest of the others where EXISTS
-- would do: looked up one by one, in the order of the indexes `…_named`, whatever statistics say. A comparison with OR
-- would not be bounded by them.)
CREATE OR REPLACE VIEW customer_names AS
    SELECT c.id AS customer, c.account,
           ARRAY(SELECT l.ref FROM customer_links l WHERE l.customer = c.id AND c.account = ''
                 UNION
                 SELECT c.ref
                  WHERE c.ref IS NOT NULL AND c.account = '' AND NOT starts_with(c.ref, 'cus_')
                    AND NOT EXISTS (SELECT FROM customer_links l WHERE l.ref = c.ref)
                    AND CASE WHEN c.deleted
                             THEN coalesce(
                                   (SELECT o.id FROM customers o
                                     WHERE o.ref = c.ref AND NOT o.deleted AND o.account = ''
                                     ORDER BY o.mark_created DESC, o.id DESC LIMIT 1),
                                   (SELECT n.id FROM checkout_sessions n JOIN customers o ON o.id = n.customer
                                     WHERE n.client_reference_id = c.ref AND NOT n.deleted AND n.account = ''
                                       AND NOT o.deleted AND o.account = ''
                                     ORDER BY n.mark_created DESC, n.id DESC LIMIT 1))
                             ELSE (SELECT o.id FROM customers o
                                    WHERE o.ref = c.ref AND NOT o.deleted AND o.account = ''
                                      AND (o.mark_created, o.id) > (c.mark_created, c.id)
                                    ORDER BY o.mark_created DESC, o.id DESC LIMIT 1)
                         END IS NULL
                 UNION
                 SELECT s.client_reference_id
                   FROM (SELECT * FROM checkout_sessions s WHERE s.customer = c.id OFFSET 0) s
                  WHERE NOT s.deleted AND s.account = '' AND c.account = ''
                    AND NOT starts_with(s.client_reference_id, 'cus_')
                    AND NOT EXISTS (SELECT FROM customer_links l WHERE l.ref = s.client_reference_id)
                    AND (SELECT o.id FROM customers o
                          WHERE o.ref = s.client_reference_id AND o.id <> c.id AND NOT o.deleted AND o.account = ''
                          ORDER BY o.mark_created DESC, o.id DESC LIMIT 1) IS NULL
                    AND CASE WHEN c.deleted
                             THEN (SELECT n.id FROM checkout_sessions n JOIN customers o ON o.id = n.customer
                                    WHERE n.client_reference_id = s.client_reference_id AND n.customer <> c.id
                                      AND NOT n.deleted AND n.account = '' AND NOT o.deleted AND o.account = ''
                                    ORDER BY n.mark_created DESC, n.id DESC LIMIT 1)
                             ELSE (SELECT n.id FROM checkout_sessions n JOIN customers o ON o.id = n.customer
                                    WHERE n.client_reference_id = s.client_reference_id AND n.customer <> c.id
                                      AND NOT n.deleted AND n.account = '' AND NOT o.deleted AND o.account = ''
                                      AND (n.mark_created, n.id) > (s.mark_created, s.id)
                                    ORDER BY n.mark_created DESC, n.id DESC LIMIT 1)
                         END IS NULL
                 ORDER BY 1) AS refs
      FROM customers c;
"""


def upgrade() -> None:
    op.execute(VIEW)
    # Those that were told otherwise are told now.
    op.execute("""
        INSERT INTO changed_refs (ref)
        SELECT DISTINCT c.ref
          FROM customers c JOIN checkout_sessions s ON s.client_reference_id = c.ref
         WHERE c.deleted AND NOT s.deleted
    """)
