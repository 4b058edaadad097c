"""`usage-batch`, `usage-single`, `usage-sustained`: usage from the request to the disk, and on to the ledger."""

import asyncio
import secrets
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import count
from time import perf_counter_ns

import httpx

from benchmarks.load import Result, WrongAnswer, put_load
from benchmarks.report import Report, Side, at_least, below
from benchmarks.rig import METER, Rig
from benchmarks.turns import Lane, Run, http_lane, take_turns
from benchmarks.usage_requests import CUSTOMERS, SCATTER, VALUE, UsageRequests, expect_accepted
from tallystick import db
from tallystick.usage.buffer import buffered_bytes
from tallystick.usage.drain import MAX_EVENTS_PER_TRANSACTION
from tallystick.usage.events import UsageEvent
from tallystick.usage.ledger import record_events

BATCH = 100
BATCH_CONNECTIONS = 8
SINGLE_CONNECTIONS = 32

# What may wait in Valkey before the load pauses: some 40,000 events, a second of work, so that it cannot grow.
MOST_WAITING_BYTES = 6 * 1024 * 1024
# Requests between two looks at what waits.
REQUESTS_A_LOOK = 32
PROBE_EVERY_SECONDS = 0.5


async def measure_batch(rig: Rig) -> Report:
    """100 events a request over 8 connections, durable before the 202; yardstick: a route that only reads."""
    report = await _measure_ingest(rig, "usage-batch", BATCH, BATCH_CONNECTIONS, first_guess=300)
    rate = report.flows[0].rate * BATCH
    report.targets += [at_least(80_000, rate, "events/s"), at_least(0.2, report.ratio or 0, "of the yardstick")]
    return report


async def measure_single(rig: Rig) -> Report:
    """One event a request over 32 connections; the same yardstick."""
    report = await _measure_ingest(rig, "usage-single", 1, SINGLE_CONNECTIONS, first_guess=1_500)
    report.targets += [
        at_least(0.35, report.ratio or 0, "of the yardstick"),
        below(25, report.flows[0].percentile_ms(95), "ms for 95 %"),
    ]
    return report


async def _measure_ingest(rig: Rig, name: str, events: int, connections: int, *, first_guess: int) -> Report:
    source = f"{name}-{secrets.token_hex(4)}"
    requests = UsageRequests(source, await rig.make_headers(source))
    bare = UsageRequests(source, {})
    lanes = [
        http_lane(
            Side("tallystick", "requests/s"),
            [rig.api_port],
            partial(requests.make, events=events),
            expect_accepted(events),
            connections=connections,
            first_guess=first_guess,
            settle=rig.drain,
        ),
        http_lane(
            Side("a route that only reads", "requests/s"),
            [rig.bare_port],
            partial(bare.make, events=events),
            _expect_read,
            connections=connections,
            first_guess=3 * first_guess,
        ),
    ]
    await take_turns(rig, lanes, name)
    memory = rig.memory()
    checked = await rig.check_usage(source, requests.made, requests.quantity)
    report = Report(name, [lanes[0].side], lanes[1].side, [], checked, memory=memory)
    if events > 1:
        report.facts["accepted"] = f"{report.flows[0].rate * events:,.0f} events/s"
    return report


def _expect_read(index: int, status: int, body: bytes) -> None:
    if status != 202:
        raise WrongAnswer(f"{status}: {body[:300]!r}")


async def measure_sustained(rig: Rig) -> Report:
    """Ingest and drain together, to the committed ledger; yardstick: the ledger alone, fed in a loop."""
    source = f"usage-sustained-{secrets.token_hex(4)}"
    headers = await rig.make_headers(source)
    requests, alone = UsageRequests(source, headers), LedgerLoop(rig, f"ledger-alone-{secrets.token_hex(4)}")
    waited: list[int] = []
    delays = Side("202 to queryable", "")

    turns = count()

    def prepare_flow(seconds: float) -> Run:
        probed = delays if next(turns) else Side("warming up", "")  # the worker is still starting then
        return lambda: _sustain(rig, requests, headers, seconds, waited, probed)

    lanes = [
        Lane(Side("ingest and drain", "events/s"), prepare_flow),
        Lane(Side("the ledger alone", "events/s"), alone.prepare),
    ]
    await rig.stack.start_process("worker", "worker")
    try:
        await take_turns(rig, lanes, "usage-sustained")
        memory = rig.memory()
    finally:
        await rig.stack.stop_process("worker")
    checked = await rig.check_usage(source, requests.made, requests.quantity)
    checked += f"; of the yardstick {await rig.check_usage(alone.source, alone.recorded, VALUE * alone.recorded)}"
    return Report(
        "usage-sustained",
        [lanes[0].side],
        lanes[1].side,
        [
            at_least(40_000, lanes[0].side.rate, "events/s"),
            below(2_000, delays.percentile_ms(99), "ms from the 202 until it can be queried, for 99 %"),
        ],
        checked,
        {
            "from the 202 until it can be queried": f"p50 {delays.percentile_ms(50):.0f} ms",
            "the most that waited in Valkey": f"{max(waited) / 2**20:.1f} MiB",
        },
        memory,
    )


async def _sustain(
    rig: Rig, requests: UsageRequests, headers: dict[str, str], seconds: float, waited: list[int], delays: Side
) -> Result:
    """Send as fast as the ledger follows. The result counts what is committed there, and the time until it is."""
    before, started = requests.made, perf_counter_ns()
    latencies: list[int] = []
    ended = asyncio.Event()
    probing = asyncio.create_task(_probe(rig, requests, headers, delays, ended))
    try:
        while perf_counter_ns() - started < seconds * 1e9 and not probing.done():
            waited.append(await buffered_bytes(rig.resources.redis))
            if waited[-1] > MOST_WAITING_BYTES:
                await asyncio.sleep(0.01)
                continue
            chunk = requests.make(REQUESTS_A_LOOK, BATCH)
            result = await put_load([rig.api_port], chunk, connections=BATCH_CONNECTIONS, check=expect_accepted(BATCH))
            latencies += result.latencies
        await wait_until_drained(rig)
        took = perf_counter_ns() - started
    finally:
        ended.set()
        await probing
    return Result(requests.made - before, took, latencies)


async def wait_until_drained(rig: Rig) -> None:
    """Wait until the worker has moved everything out of Valkey."""
    while True:
        if not await buffered_bytes(rig.resources.redis):
            return
        await asyncio.sleep(0.01)


async def _probe(
    rig: Rig, requests: UsageRequests, headers: dict[str, str], delays: Side, ended: asyncio.Event
) -> None:
    """Post one event after the other beside the load, and note how long each takes until a query shows it."""
    async with httpx.AsyncClient(base_url=rig.stack.api_url, headers=headers, timeout=20) as client:
        while not ended.is_set():
            customer, body = requests.make_probe()
            answer = await client.post("/v1/usage", content=body)
            if answer.status_code != 202:
                raise WrongAnswer(f"{answer.status_code}: {answer.text[:300]}")
            accepted = perf_counter_ns()
            query = {"customer": customer, "window": "month"}
            while not (answer := await client.get("/v1/usage", params=query)).json()["data"]:
                answer.raise_for_status()
                await asyncio.sleep(0.01)
            delays.latencies.append(perf_counter_ns() - accepted)
            await asyncio.sleep(PROBE_EVERY_SECONDS)


class LedgerLoop:
    """The ledger by itself: its largest transactions, one after the other, of events that lie ready."""

    def __init__(self, rig: Rig, source: str) -> None:
        self.source = source
        self.recorded = 0
        self._engine = rig.resources.engine
        self._per_second = 20_000.0
        self._at = datetime.now(UTC) - timedelta(hours=2)

    def prepare(self, seconds: float) -> Run:
        """Make about as many transactions ready as fit into the time."""
        transactions = max(1, round(self._per_second * seconds / MAX_EVENTS_PER_TRANSACTION))
        size = min(MAX_EVENTS_PER_TRANSACTION, max(1, int(self._per_second * seconds)))
        batches = [self._make_events(size, number) for number in range(transactions)]

        async def run() -> Result:
            started = perf_counter_ns()
            for batch in batches:
                async with db.transaction(self._engine) as connection:
                    results = await record_events(connection, batch, accepted_already=True)
                self.recorded += results.count("recorded")
            result = Result(size * transactions, perf_counter_ns() - started)
            self._per_second = result.per_second
            return result

        return run

    def _make_events(self, size: int, number: int) -> list[UsageEvent]:
        first = self.recorded + number * size
        return [
            UsageEvent(
                self.source,
                f"{(first + place) * SCATTER % 2**64:016x}",
                f"{self.source}-{(first + place) % CUSTOMERS}",
                METER,
                VALUE,
                self._at,
                stamped=False,
                received_at=self._at,
            )
            for place in range(size)
        ]
