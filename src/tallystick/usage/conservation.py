"""Conservation: what was accepted is somewhere. The ledger equals the sum of all named states (invariant I2)."""

from dataclasses import dataclass
from decimal import Decimal, localcontext

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from tallystick.usage.events import plain

COUNT = text("""
    WITH ledger AS (
        SELECT coalesce(sum(quantity), 0) AS accepted, coalesce(sum(events), 0)::bigint AS events
          FROM (SELECT sum(value) AS quantity, count(*) AS events FROM usage_events
                UNION ALL SELECT sum(quantity), sum(events) FROM usage_retired) held
    ), totals AS (
        SELECT coalesce(sum(quantity - sealed), 0) AS open FROM usage_totals
    ), deliveries AS (
        SELECT coalesce(sum(value) FILTER (WHERE state IN ('pending', 'sending')), 0) AS pending,
               coalesce(sum(value) FILTER (WHERE state = 'sent'), 0) AS sent,
               coalesce(sum(value) FILTER (WHERE state = 'confirmed'), 0) AS confirmed,
               coalesce(sum(value) FILTER (WHERE state = 'parked'), 0) AS parked,
               coalesce(sum(value) FILTER (WHERE state = 'voided'), 0) AS voided
          FROM usage_deliveries
    )
    SELECT events, accepted, open + pending AS pending, sent, confirmed, parked, voided
      FROM ledger, totals, deliveries
""")


@dataclass(frozen=True)
class Conservation:
    """Quantities by state, over all customers and meters, of all events ever accepted."""

    events: int
    accepted: Decimal
    pending: Decimal
    sent: Decimal
    confirmed: Decimal
    parked: Decimal
    voided: Decimal

    @property
    def difference(self) -> Decimal:
        """Accepted less everything that is accounted for; anything but 0 is a bug."""
        with localcontext(prec=200):  # sums of many 15-digit values have more digits than the default context keeps
            return self.accepted - (self.pending + self.sent + self.confirmed + self.parked + self.voided)

    def as_json(self) -> dict[str, str | int]:
        """Every number by its name; quantities as exact decimal text."""
        quantities = ("accepted", "pending", "sent", "confirmed", "parked", "voided", "difference")
        return {"events": self.events} | {name: plain(getattr(self, name)) for name in quantities}


async def count_conservation(connection: AsyncConnection) -> Conservation:
    """Add up both sides, in one statement and so from one snapshot."""
    return Conservation(*(await connection.execute(COUNT)).one())
