"""A process may die between any two steps: each flow is run once for each step, dies after it, and is run again.

A step is a commit, a call to Stripe that was answered, or a command that Redis has carried out. Whatever is done after
the last step before a death is as if it had not been done. In the end everything must be as if nobody had died.
"""

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from tallystick import db
from tallystick.resources import Resources
from tallystick.rules import Rules
from tallystick.stripe_gateway import Connections
from tallystick.usage.buffer import claim_and_append
from tallystick.usage.cancellations import cancel_events
from tallystick.usage.corrections import Wanted, record_correction
from tallystick.usage.delivery import deliver_all
from tallystick.usage.drain import drain
from tallystick.usage.meters import refresh_meters
from tallystick.usage.sealing import answer_seal_requests, seal_everything
from tallystick.usage.sealing_requests import request_seals
from tallystick.usage.thresholds import announce_thresholds
from tests.conftest import FakeStripe, empty_stores
from tests.usage.making import METER, conservation, last_hour, make_customer, make_event, read_all

COUNT = "jobs"
RULES = Rules.model_validate({"meters": {METER: {"thresholds": ["2", "5"]}}})
# After a death: when every lease of the dead one has ended.
LATER = timedelta(hours=1)

END = {
    "ledger": "SELECT id, meter, value FROM usage_events ORDER BY id",
    "totals": "SELECT meter, bucket_start, quantity, events, sealed, sealed_events FROM usage_totals ORDER BY 1, 2",
    "deliveries": "SELECT event_name, timestamp, value, events, state FROM usage_deliveries ORDER BY 1, 2, 3",
    "corrections": "SELECT id, method, state, delta FROM usage_corrections ORDER BY id",
    "told": "SELECT type, data FROM notifications ORDER BY type, data ->> 'threshold'",
    "requests": "SELECT customer FROM seal_requests",
}


class Died(BaseException):
    """Nothing in the code may catch it, as nothing can catch a power failure."""


@dataclasses.dataclass
class Life:
    """Counts steps, and ends after the one with the number `until`."""

    until: int | None
    steps: list[str] = dataclasses.field(default_factory=list)

    def go_on(self) -> None:
        if self.until is not None and len(self.steps) >= self.until:
            raise Died

    def step(self, name: str) -> None:
        self.steps.append(name)
        self.go_on()


@asynccontextmanager
async def living(life: Life, resources: Resources) -> AsyncIterator[None]:
    """Within it, each step counts; whoever still runs when the life has ended takes none."""
    begin, call = db.transaction, Connections.request_async
    command: Any = resources.redis.execute_command

    @asynccontextmanager
    async def transaction(engine: AsyncEngine) -> AsyncIterator[AsyncConnection]:
        life.go_on()
        async with begin(engine) as connection:
            yield connection
        life.step("commit")

    async def request_async(self: Any, method: str, url: str, *rest: Any, **more: Any) -> Any:
        life.go_on()
        answer = await call(self, method, url, *rest, **more)
        life.step(f"{method} {url.rpartition('/')[2]}")
        return answer

    async def execute_command(*words: Any, **options: Any) -> Any:
        life.go_on()
        answer = await command(*words, **options)
        life.step(str(words[0]))
        return answer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(db, "transaction", transaction)
        patch.setattr(Connections, "request_async", request_async)
        patch.setattr(resources.redis, "execute_command", execute_command)
        yield


Flow = Callable[[Resources, datetime], Awaitable[None]]


async def send_usage(resources: Resources, now: datetime) -> None:
    await drain(resources, now, reclaim_after=timedelta(0))
    await announce_thresholds(resources, now)
    await answer_seal_requests(resources, now)
    await deliver_all(resources, now)


async def correct_usage(resources: Resources, now: datetime) -> None:
    for id, event, value in (("void", "alone", None), ("count", "job-1", None), ("adjust", "e1", Decimal("0.5"))):
        action = "void" if value is None else "adjust"
        wanted = Wanted("tests", id, event, None, action, value, "a test")  # type: ignore[arg-type]
        async with db.transaction(resources.engine) as connection:
            await record_correction(connection, wanted, RULES, now)
    await cancel_events(resources, now)
    await seal_everything(resources, now)
    await deliver_all(resources, now)


async def make_usage(resources: Resources, fake: FakeStripe) -> None:
    """An empty world, the same each time, in which Redis has usage of two meters and an invoice was drafted."""
    await empty_stores(resources)
    (await fake.control.post("/_fake/reset", json={"seed": 1})).raise_for_status()
    for name, formula in ((METER, "sum"), (COUNT, "count")):
        await fake.client.v1.billing.meters.create_async(
            {"display_name": name, "event_name": name, "default_aggregation": {"formula": formula}}
        )
    now = datetime.now(UTC)
    await refresh_meters(resources, now)
    customer = (await fake.client.v1.customers.create_async({})).id
    await make_customer(resources, customer=customer)
    at = last_hour()
    events = [
        *(make_event(f"e{n}", at=at, value="1.5") for n in (1, 2)),
        make_event("alone", at=at - timedelta(hours=2), value="7"),
        *(make_event(f"job-{n}", at=at + timedelta(seconds=n), meter=COUNT) for n in (1, 2)),
    ]
    for some in (events[:3], events[3:]):
        await claim_and_append(resources.redis, some, now, dedupe_hours=72, max_bytes=10**9)
    async with db.transaction(resources.engine) as connection:
        await request_seals(connection, {customer: "in_1"})


async def make_sent_usage(resources: Resources, fake: FakeStripe) -> None:
    await make_usage(resources, fake)
    await send_usage(resources, datetime.now(UTC))


async def read_end(resources: Resources, fake: FakeStripe) -> dict[str, Any]:
    taken = (await fake.control.get("/_fake/meter_events")).json()["meter_events"]
    await conservation(resources)
    at_stripe = sorted((event["event_name"], event["timestamp"], event["value"], event["cancelled"]) for event in taken)
    return {name: await read_all(resources, statement) for name, statement in END.items()} | {"stripe": at_stripe}


@pytest.mark.parametrize(
    ("prepare", "flow"), [(make_usage, send_usage), (make_sent_usage, correct_usage)], ids=["usage", "corrections"]
)
async def test_whoever_dies_wherever_each_effect_comes_once(
    resources: Resources, fake_stripe: FakeStripe, prepare: Callable[..., Awaitable[None]], flow: Flow
) -> None:
    settings = resources.settings.model_copy(update={"stripe_calls_per_second": 10_000})
    resources = dataclasses.replace(resources, settings=settings)
    resources.rules.rules = RULES
    whole = Life(until=None)
    await prepare(resources, fake_stripe)
    async with living(whole, resources):
        await flow(resources, datetime.now(UTC))
    await flow(resources, datetime.now(UTC) + LATER)
    end = await read_end(resources, fake_stripe)
    assert end["stripe"]
    assert {"commit", "post meter_events"} <= set(whole.steps)

    for number, name in enumerate(whole.steps, 1):
        await prepare(resources, fake_stripe)
        others = asyncio.all_tasks()
        async with living(Life(until=number), resources):
            with pytest.raises(Died):
                await flow(resources, datetime.now(UTC))
            # Its tasks die with it.
            await asyncio.gather(*(asyncio.all_tasks() - others), return_exceptions=True)
        await flow(resources, datetime.now(UTC) + LATER)
        assert await read_end(resources, fake_stripe) == end, f"died after step {number}: {name}"
