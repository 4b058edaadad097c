"""`growth`: how fast usage is taken and drained when the ledger is larger and larger."""

import secrets
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from time import perf_counter

from sqlalchemy import text

from benchmarks.load import put_load
from benchmarks.report import Report, Side, at_least
from benchmarks.rig import METER, Rig
from benchmarks.usage_requests import UsageRequests, expect_accepted

BATCH = 100
CONNECTIONS = 8
DAYS = 30
CUSTOMERS = 50
EVENTS_PER_STATEMENT = 200_000
REQUESTS_PER_SECOND = 500

# The filling is spread evenly over the hours of the days, and so over the ledger's partitions; its ids are in no order.
FILL_TOTALS = text("""
    INSERT INTO usage_totals (customer_ref, meter, bucket_start, bucket_end)
    SELECT :run || '-' || customer, :meter, hour, hour + interval '1 hour'
      FROM generate_series(0, CAST(:customers AS integer) - 1) AS customer,
           generate_series(CAST(:start AS timestamptz), CAST(:end AS timestamptz), interval '1 hour') AS hour
""")
FILL_EVENTS = text("""
    INSERT INTO usage_events
           (source, id, day, customer_ref, meter, value, timestamp, stamped, received_at, total_id, seal)
    SELECT :run, m.id, CAST(m.at AS date), m.customer_ref, :meter, 1, m.at, false, m.at, t.id, 1
      FROM (SELECT md5(CAST(number AS text)) AS id, :run || '-' || number % :customers AS customer_ref,
                   CAST(:start AS timestamptz) + number / :customers % CAST(:hours AS integer) * interval '1 hour' AS at
              FROM generate_series(CAST(:first AS integer), CAST(:last AS integer)) AS number) m
      JOIN usage_totals t ON t.customer_ref = m.customer_ref AND t.meter = :meter AND t.bucket_start = m.at
""")
ADD_UP = text("""
    UPDATE usage_totals t SET quantity = s.quantity, events = s.events
      FROM (SELECT total_id, sum(value) AS quantity, count(*) AS events FROM usage_events
             WHERE source = :run GROUP BY total_id) s
     WHERE t.id = s.total_id
""")


async def measure_growth(rig: Rig) -> Report:
    """Ingest, then drain, at each size of the ledger; the first size is the yardstick of the last."""
    run, source = f"filling-{secrets.token_hex(4)}", f"growth-{secrets.token_hex(4)}"
    requests = UsageRequests(source, await rig.make_headers(source))
    now = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
    start = now - timedelta(days=DAYS)
    bar = rig.bars.add_task("growth", total=max(rig.sizes))
    filling = {"run": run, "meter": METER, "customers": CUSTOMERS, "start": start}
    await rig.fill(FILL_TOTALS, **filling, end=now - timedelta(hours=1))
    ingest: list[Side] = []
    drained: list[Side] = []
    filled = 0
    for size in sorted(rig.sizes):
        # What earlier sizes measured lies in the ledger as well.
        while filled + requests.made < size:
            last = min(size - requests.made, filled + EVENTS_PER_STATEMENT)
            await rig.fill(FILL_EVENTS, **filling, hours=DAYS * 24, first=filled, last=last - 1)
            filled = last
            rig.bars.update(bar, completed=filled + requests.made)
        await rig.fill(ADD_UP, run=run)
        await rig.fill(text("ANALYZE usage_events, usage_totals"))
        ingest.append(Side(f"ingest at {size:,}", "events/s"))
        drained.append(Side(f"drain at {size:,}", "events/s"))
        for turn in range(rig.rounds + 1):
            sides = (ingest[-1], drained[-1]) if turn else (Side("", ""), Side("", ""))
            await _ingest_and_drain(rig, requests, *sides)
    checked = await rig.check_usage(requests.source, requests.made, requests.quantity)
    checked += f"; of the filling {await rig.check_usage(run, filled, Decimal(filled))}"
    return Report(
        "growth",
        [side for pair in zip(ingest, drained, strict=True) for side in pair],
        None,
        [
            at_least(0.8, ingest[-1].rate / ingest[0].rate, "of the first size's ingest, at the last"),
            at_least(0.8, drained[-1].rate / drained[0].rate, "of the first size's drain, at the last"),
        ],
        checked,
        memory=rig.memory(),
    )


async def _ingest_and_drain(rig: Rig, requests: UsageRequests, ingest: Side, drained: Side) -> None:
    before = requests.made
    load = requests.make(max(CONNECTIONS, int(rig.seconds * REQUESTS_PER_SECOND)), BATCH)
    async with rig.measured(ingest):
        result = await put_load([rig.api_port], load, connections=CONNECTIONS, check=expect_accepted(BATCH))
    ingest.rates.append(result.per_second * BATCH)
    ingest.latencies += result.latencies
    started = perf_counter()
    async with rig.measured(drained):
        await rig.drain()
    drained.rates.append((requests.made - before) / (perf_counter() - started))
