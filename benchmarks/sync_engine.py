"""Stripe's sync-engine beside the benchmark `webhooks`, where it is installed.

It keeps the same kinds of objects from the same events, without a record of the events and without a transaction.
Install it in a folder, `npm install @supabase/stripe-sync-engine stripe`, and name that folder: `--sync-engine FOLDER`.
"""

import secrets
from pathlib import Path

from sqlalchemy import text

from benchmarks.load import WrongAnswer
from benchmarks.report import CheckFailed, Side
from benchmarks.rig import Rig
from benchmarks.stripe_events import StripeEvents
from benchmarks.turns import Lane, http_lane
from tallystick import db
from tallystick.dev.stack import HOST
from tallystick.terminal import claim_port

NAME = "Stripe's sync-engine"
SERVER = Path(__file__).with_suffix(".mjs")
COUNT = "SELECT count(*) FROM stripe.{table} WHERE id = ANY(:ids)"


class SyncEngine:
    """The engine as a server, over the same PostgreSQL in a schema of its own, and the events that it gets."""

    def __init__(self, rig: Rig, customers: int) -> None:
        self._rig = rig
        self.side = Side(NAME, "events/s")
        self.events = StripeEvents(secrets.token_hex(3), rig.stack.environment["STRIPE_WEBHOOK_SECRET"], customers)

    async def start(self, folder: Path, *, connections: int) -> Lane:
        """Start it, and return the lane that sends it events. It ends with the rig."""
        stack, port = self._rig.stack, claim_port(0, NAME, HOST)
        given = (stack.environment["DATABASE_URL"], stack.environment["STRIPE_WEBHOOK_SECRET"])
        await stack.start_command(NAME, "node", str(SERVER), str(folder), str(port), *given)
        await stack.wait_for(NAME, f"http://127.0.0.1:{port}/")
        return http_lane(
            self.side, [port], self.events.make, _expect_received, connections=connections, first_guess=400
        )

    async def check(self) -> None:
        """Raise `CheckFailed` unless it has every object that it was told of."""
        async with db.transaction(self._rig.patient) as connection:
            for table, latest in self.events.latest.items():
                stored = await connection.scalar(text(COUNT.format(table=table)), {"ids": list(latest)})
                if stored != len(latest):
                    raise CheckFailed(f"{NAME} has {stored} of {len(latest)} {table}")


def _expect_received(index: int, status: int, body: bytes) -> None:
    if status != 200:
        raise WrongAnswer(f"{NAME}: {status}: {body[:300]!r}")
