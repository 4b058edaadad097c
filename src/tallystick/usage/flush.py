"""Flush: all usage to Stripe now. What is sealed is sent while the rest is being sealed, as in the worker's loops."""

import asyncio
from dataclasses import dataclass
from datetime import datetime, timedelta
from time import monotonic

from tallystick.resources import Resources
from tallystick.usage.delivery import deliver_all
from tallystick.usage.sealing import seal_everything

# Between two looks for sealed totals, once all before them were sent.
LOOK_AGAIN = timedelta(milliseconds=20)


@dataclass(frozen=True)
class Flushed:
    """How many totals were sealed, and how many deliveries tried: also some that had been sealed before."""

    sealed: int
    tried: int


async def flush(resources: Resources, now: datetime) -> Flushed:
    """Drain, seal every total that a linked customer has, and send until nothing is due."""
    began = monotonic()
    tried = 0
    # Died here: what is sealed is written down, and the worker sends it; the rest is still open.
    sealing = asyncio.create_task(seal_everything(resources, now))
    try:
        while not sealing.done():
            tried += await deliver_all(resources, now + timedelta(seconds=monotonic() - began))
            await asyncio.wait([sealing], timeout=LOOK_AGAIN.total_seconds())
    finally:
        sealing.cancel()  # nothing, if it has ended
        await asyncio.gather(sealing, return_exceptions=True)
    # What could be sealed is sent, also when something else could not.
    tried += await deliver_all(resources, now + timedelta(seconds=monotonic() - began))
    return Flushed(sealing.result(), tried)
