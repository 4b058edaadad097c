"""`flush`: totals of many customers sealed and told to Stripe; yardstick: the SDK in a loop, one call at a time.

The loop is the SDK as anybody would use it, with the HTTP client that it comes with. What the same loop reaches through
tallystick's own connections is said beside it.
"""

import secrets
import uuid
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from time import perf_counter, perf_counter_ns
from urllib.parse import urlencode

import httpx
from sqlalchemy import text
from stripe import HTTPXClient, StripeClient

from benchmarks.load import WrongAnswer, make_request, put_load
from benchmarks.report import CheckFailed, Report, Side, at_least
from benchmarks.rig import METER, Rig
from tallystick import db
from tallystick.resources import Resources, open_resources
from tallystick.usage.conservation import count_conservation
from tallystick.usage.delivery import deliver_all
from tallystick.usage.flush import flush
from tallystick.usage.meters import refresh_meters
from tallystick.usage.sealing import seal_everything

# The most that the settings take; no Stripe takes more, and this one has no limit at all.
CALLS_PER_SECOND = 10_000
STREAMED_PER_SECOND = 100_000
# Enough for a rate that does not depend on the start.
YARDSTICK_CALLS = 500
SINK_CONNECTIONS = 32

FILL_CUSTOMERS = text("""
    INSERT INTO customers (id, mark_event)
    SELECT :run || customer, 'evt_' || customer FROM generate_series(1, CAST(:customers AS integer)) AS customer
""")
FILL_EVENTS = text("""
    WITH totals AS (
        INSERT INTO usage_totals (customer_ref, meter, bucket_start, bucket_end, quantity, events)
        SELECT :run || customer, :meter, :hour, CAST(:hour AS timestamptz) + interval '1 hour', customer, 1
          FROM generate_series(1, CAST(:customers AS integer)) AS customer
        RETURNING id, customer_ref, quantity
    )
    INSERT INTO usage_events
           (source, id, day, customer_ref, meter, value, timestamp, stamped, received_at, total_id, seal)
    SELECT :run, customer_ref, CAST(CAST(:hour AS timestamptz) AS date), customer_ref, :meter, quantity, :hour, false,
           :hour, id, 1
      FROM totals
""")
COUNT_DELIVERIES = text("""
    SELECT state, sender, count(*), sum(value) FROM usage_deliveries
     WHERE starts_with(customer, :run) GROUP BY state, sender
""")


async def measure_flush(rig: Rig) -> Report:
    """One total a customer, sealed and delivered as `tallystick flush` does, by each sender; no limits at Stripe."""
    base = f"http://127.0.0.1:{rig.bare_port}"
    settings = rig.resources.settings.model_copy(
        update={
            "stripe_api_base": base,
            "stripe_meter_events_base": base,
            "stripe_calls_per_second": CALLS_PER_SECOND,
            "stripe_stream_events_per_second": STREAMED_PER_SECOND,
        }
    )
    customers = max(rig.sizes)
    await refresh_meters(rig.resources, datetime.now(UTC))
    called, streamed = Side("v1 meter events", "totals/s"), Side("meter event stream", "totals/s")
    sealed, one_by_one = Side("sealing alone", "totals/s"), Side("the SDK in a loop", "calls/s")
    through_ours = Side("the same through our connections", "calls/s")
    checked = ""
    async with open_resources(settings, application_name="benchmarks") as resources:
        for turn in rig.bars.track(range(rig.rounds + 1), description="flush"):
            for side, sender in ((called, "meter_events"), (streamed, "meter_event_stream")):
                run = f"cus_{secrets.token_hex(4)}n"
                await _fill(rig, run, customers)
                of_sender = replace(resources, settings=settings.model_copy(update={"sender": sender}))
                await _flush(rig, of_sender, customers, side if turn else Side("", ""))
                checked = await check_flush(rig, run, customers, sender)
            await _fill(rig, f"cus_{secrets.token_hex(4)}n", customers)
            await _seal(rig, resources, customers, sealed if turn else Side("", ""))
            await _call_as_anybody(rig, base, one_by_one if turn else Side("", ""))
            await _call_one_by_one(rig, resources.stripe, through_ours if turn else Side("", ""))
    report = Report("flush", [called, streamed], one_by_one, [], checked, memory=rig.memory())
    report.targets.append(at_least(2, called.rate / one_by_one.rate, "times the SDK in a loop, with v1 meter events"))
    report.targets.append(at_least(10, streamed.rate / one_by_one.rate, "times the SDK in a loop, with the stream"))
    report.facts["sealing alone"] = f"{sealed.rate:,.0f} totals/s"
    report.facts["the SDK in a loop, through tallystick's connections"] = f"{through_ours.rate:,.0f} calls/s"
    report.facts["the receiving end alone"] = (
        f"{await _measure_sink(rig):,.0f} calls/s over {SINK_CONNECTIONS} connections"
    )
    return report


async def _fill(rig: Rig, run: str, customers: int) -> None:
    hour = datetime.now(UTC).replace(minute=0, second=0, microsecond=0) - timedelta(hours=3)
    await rig.fill(FILL_CUSTOMERS, run=run, customers=customers)
    await rig.fill(FILL_EVENTS, run=run, customers=customers, meter=METER, hour=hour)
    await rig.fill(text("ANALYZE usage_totals, customers"))


async def _flush(rig: Rig, resources: Resources, customers: int, side: Side) -> None:
    started = perf_counter()
    async with rig.measured(side):
        await flush(resources, datetime.now(UTC))
    side.rates.append(customers / (perf_counter() - started))


async def _seal(rig: Rig, resources: Resources, customers: int, side: Side) -> None:
    started = perf_counter()
    async with rig.measured(side):
        await seal_everything(resources, datetime.now(UTC))
    side.rates.append(customers / (perf_counter() - started))
    await deliver_all(resources, datetime.now(UTC))


async def check_flush(rig: Rig, run: str, customers: int, sender: str) -> str:
    """Raise `CheckFailed` unless each total was delivered once by the sender, as the receiving end counted it."""
    expected = (customers, Decimal(customers * (customers + 1) // 2))
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{rig.bare_port}", timeout=20) as sink:
        taken = (await sink.get("/taken", params={"customer": run})).json()
    async with db.transaction(rig.patient) as connection:
        states = {
            (state, by): (number, value)
            for state, by, number, value in await connection.execute(COUNT_DELIVERIES, {"run": run})
        }
        difference = (await count_conservation(connection)).difference
    if (
        (taken["identifiers"], Decimal(taken["sum"])) != expected
        or states != {("sent", sender): expected}
        or difference
    ):
        raise CheckFailed(
            f"{expected[0]} totals of {expected[1]}, taken: {taken}; deliveries: {states}; {difference} unaccounted"
        )
    return f"{customers:,} totals a round and sender, each delivered once, with the right sum; {taken['repeats']} twice"


async def _call_as_anybody(rig: Rig, base: str, side: Side) -> None:
    connections = HTTPXClient()
    try:
        stripe = StripeClient("sk_test_benchmark", base_addresses={"api": base}, http_client=connections)
        await _call_one_by_one(rig, stripe, side)
    finally:
        await connections.close_async()


async def _call_one_by_one(rig: Rig, stripe: StripeClient, side: Side) -> None:
    started = perf_counter()
    async with rig.measured(side):
        for _ in range(YARDSTICK_CALLS):
            called = perf_counter_ns()
            await stripe.v1.billing.meter_events.create_async(
                {
                    "event_name": METER,
                    "identifier": str(uuid.uuid4()),
                    "payload": {"stripe_customer_id": "yardstick", "value": "1"},
                    "timestamp": int(datetime.now(UTC).timestamp()),
                }
            )
            side.latencies.append(perf_counter_ns() - called)
    side.rates.append(YARDSTICK_CALLS / (perf_counter() - started))


async def _measure_sink(rig: Rig) -> float:
    """What the receiving end takes when nothing but prebuilt requests is before it: a flow near this measures it."""
    requests = []
    for _ in range(YARDSTICK_CALLS * 4):
        form = {
            "event_name": METER,
            "identifier": str(uuid.uuid4()),
            "payload[stripe_customer_id]": "sink",
            "payload[value]": "1",
            "timestamp": int(datetime.now(UTC).timestamp()),
        }
        requests.append(make_request("POST", "/v1/billing/meter_events", urlencode(form).encode(), {}))
    return (await put_load([rig.bare_port], requests, connections=SINK_CONNECTIONS, check=_expect_taken)).per_second


def _expect_taken(index: int, status: int, body: bytes) -> None:
    if status != 200:
        raise WrongAnswer(f"{status}: {body[:300]!r}")
