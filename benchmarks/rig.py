"""What a benchmark runs on: a stack of its own with data on disk, a bare server to compare with, and the counters."""

import os
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from time import perf_counter

from rich.console import Console
from rich.progress import Progress
from sqlalchemy import TextClause, text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from benchmarks.processes import cpu_of, peak_bytes, shared_out_bytes
from benchmarks.report import CheckFailed, Side
from tallystick import db
from tallystick.auth import SCOPES, create_key
from tallystick.dev.stack import HOST, Stack, open_stack
from tallystick.resources import Resources, open_resources
from tallystick.terminal import claim_port
from tallystick.usage.conservation import count_conservation
from tallystick.usage.drain import drain
from tallystick.usage.meters import refresh_meters

METER = "benchmark_calls"
# As for a machine with a few gigabytes to spare (docs/operations.md#sizing): the keys of the day that is being written
# fit into memory, and checkpoints are minutes apart. PostgreSQL's own defaults are for the smallest machines.
POSTGRES_SETTINGS = {"shared_buffers": "1GB", "max_wal_size": "8GB"}
# By Valkey's default of 64 MB it would write its append-only file anew every few seconds.
VALKEY_SETTINGS = {"auto-aof-rewrite-min-size": "512mb"}
BARE = "bare server"
SECOND_API = "second api"

COUNT_EVENTS = text("SELECT count(*), coalesce(sum(value), 0) FROM usage_events WHERE source = :source")
COUNT_TOTALS = text("""
    SELECT coalesce(sum(events), 0)::bigint, coalesce(sum(quantity), 0) FROM usage_totals
     WHERE starts_with(customer_ref, :source)
""")


@dataclass(frozen=True)
class Rig:
    """A running stack without its worker, and how much to measure on it.

    `patient`: PostgreSQL without the service's time limits, to fill tables and to count. `rounds` of about `seconds`
    each. `sizes`: how much data, where a benchmark grows or needs an amount. `sync_engine`: the folder that Stripe's
    sync-engine is installed in, if it is to be measured too.
    """

    stack: Stack
    resources: Resources
    patient: AsyncEngine
    bars: Progress
    bare_port: int
    rounds: int
    seconds: float
    sizes: tuple[int, ...]
    sync_engine: Path | None = None

    @property
    def api_port(self) -> int:
        return int(self.stack.environment["TALLYSTICK_PORT"])

    async def start_second_api(self) -> int:
        """Start one more API process, as behind a balancer; its port. It ends with the rig."""
        if SECOND_API in self.stack.processes:  # of a measurement before this one
            await self.stack.stop_process(SECOND_API)
        port = claim_port(0, SECOND_API, HOST)
        await self.stack.start_process(SECOND_API, "serve", TALLYSTICK_PORT=str(port))
        await self.stack.wait_for(SECOND_API, f"http://127.0.0.1:{port}/readyz")
        return port

    @property
    def processes(self) -> dict[str, int]:
        """The root of each process tree that takes part; this one puts the load."""
        assert self.stack.postgres is not None
        assert self.stack.valkey is not None
        servers = {"PostgreSQL": self.stack.postgres.pid, "Valkey": self.stack.valkey.pid}
        ours = {name: process.pid for name, process in self.stack.processes.items() if process.returncode is None}
        return {name: pid for name, pid in (ours | servers).items() if pid is not None}

    @asynccontextmanager
    async def measured(self, side: Side) -> AsyncIterator[None]:
        """Add the time and the processor time of what happens meanwhile to a side."""
        before, started = self._cpu(), perf_counter()
        yield
        side.seconds += perf_counter() - started
        for name, used in self._cpu().items():
            side.cpu[name] = side.cpu.get(name, 0) + used - before.get(name, used)

    def _cpu(self) -> dict[str, float]:
        return cpu_of(self.processes) | {"this process": sum(os.times()[:4])}

    def memory(self) -> dict[str, int]:
        """Peak resident bytes of each process; of PostgreSQL, which is many, what they have now together."""
        return {
            name: shared_out_bytes(pid) if name == "PostgreSQL" else peak_bytes(pid)
            for name, pid in self.processes.items()
        }

    async def make_headers(self, source: str) -> dict[str, str]:
        """The headers of a caller whose usage belongs to `source`."""
        async with db.transaction(self.resources.engine) as connection:
            key = await create_key(connection, name=source, source=source, scopes=list(SCOPES))
        return {"Authorization": f"Bearer {key}"}

    async def make_meter(self) -> None:
        """Make the meter at the fake Stripe, and known here: of many who ask for a new one at once some are put off."""
        listed = await self.resources.stripe.v1.billing.meters.list_async({"limit": 100})
        if METER not in {meter.event_name for meter in listed.data}:
            await self.resources.stripe.v1.billing.meters.create_async(
                {"display_name": METER, "event_name": METER, "default_aggregation": {"formula": "sum"}}
            )
        await refresh_meters(self.resources, datetime.now(UTC))

    async def drain(self) -> None:
        """Move what waits in Valkey into the ledger, here and now."""
        await drain(self.resources, datetime.now(UTC), reclaim_after=timedelta(0))

    async def fill(self, statement: TextClause, **parameters: object) -> None:
        """Run a statement that may take minutes, in a transaction of its own."""
        async with db.transaction(self.patient) as connection:
            await connection.execute(statement, parameters)

    async def check_usage(self, source: str, events: int, quantity: Decimal) -> str:
        """Raise `CheckFailed` unless the ledger and the totals hold exactly these events of a source, once each."""
        await self.drain()
        async with db.transaction(self.patient) as connection:
            recorded = tuple((await connection.execute(COUNT_EVENTS, {"source": source})).one())
            added = tuple((await connection.execute(COUNT_TOTALS, {"source": source})).one())
            difference = (await count_conservation(connection)).difference
        if recorded != (events, quantity) or added != (events, quantity) or difference:
            raise CheckFailed(
                f"accepted: {events} events, {quantity}; in the ledger: {recorded[0]}, {recorded[1]};"
                f" in the totals: {added[0]}, {added[1]}; unaccounted for: {difference}"
            )
        return f"{events:,} events, each in the ledger and in its total once"


@asynccontextmanager
async def open_rig(
    console: Console,
    bars: Progress,
    *,
    rounds: int,
    seconds: float,
    sizes: tuple[int, ...],
    sync_engine: Path | None = None,
) -> AsyncIterator[Rig]:
    """Start everything in a temporary folder, with fsync as in production, and stop and delete it at the end."""
    with tempfile.TemporaryDirectory(prefix="tallystick-benchmark-") as folder:
        ports = {"api": 0, "fake-stripe": 0}
        async with (
            open_stack(
                Path(folder),
                ports=ports,
                console=console,
                embedded_only=True,
                postgres_settings=POSTGRES_SETTINGS,
                valkey_settings=VALKEY_SETTINGS,
            ) as stack,
            open_resources(stack.settings(), application_name="benchmarks") as resources,
        ):
            # A drain beside what is measured would be measured too; those that want the worker start it again.
            await stack.stop_process("worker")
            patient = create_async_engine(stack.settings().database_url)
            rig = Rig(stack, resources, patient, bars, await _start_bare(stack), rounds, seconds, sizes, sync_engine)
            await rig.make_meter()
            try:
                yield rig
            finally:
                await patient.dispose()


async def _start_bare(stack: Stack) -> int:
    port = claim_port(0, BARE, HOST)
    await stack.start_command(BARE, sys.executable, str(Path(__file__).with_name("bare.py")), str(port))
    await stack.wait_for(BARE, f"http://127.0.0.1:{port}/nothing")
    return port
