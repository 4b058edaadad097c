"""`python -m benchmarks NAME`: measure, compare with the yardstick of the same run, and check that nothing is missing.

    usage-batch    100 events a request over 8 connections, durable before the 202; yardstick: a route that only reads
    usage-single   one event a request over 32 connections; the same yardstick

Rounds of both take turns, so that whatever else the machine does meets both alike; the medians are compared. The run
fails if what was accepted is not in the ledger afterwards, all of it, once.
"""

import argparse
import asyncio
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import count
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.load import Result, make_request, put_load
from tallystick import db
from tallystick.dev.catalogue import CUSTOMERS, METER, create_catalogue
from tallystick.dev.stack import Stack, claim_port, make_development_key, open_stack
from tallystick.resources import open_resources
from tallystick.usage.conservation import count_conservation
from tallystick.usage.drain import drain


@dataclass(frozen=True)
class Load:
    """One benchmark: how much a request carries, and over how many connections."""

    events: int
    connections: int
    requests: int


LOADS = {"usage-batch": Load(100, 8, 400), "usage-single": Load(1, 32, 6_000)}
BARE_PORT_NAME = "bare"


async def measure(name: str, rounds: int, console: Console) -> dict[str, object]:
    """Run one benchmark on a stack of its own; the figures by name."""
    load = LOADS[name]
    with tempfile.TemporaryDirectory(prefix="tallystick-benchmark-") as folder:
        async with open_stack(
            Path(folder), ports={"api": 0, "fake-stripe": 0}, console=console, embedded_only=True
        ) as stack:
            await stack.stop_process("worker")  # the drain is not what is measured here
            key = await make_development_key(stack)
            await create_catalogue(stack.settings())
            bare_port = await _start_bare(stack)
            headers = {"Authorization": f"Bearer {key}"}
            numbers = count()
            ours: list[Result] = []
            bare: list[Result] = []
            with Progress(console=console) as bars:
                for turn in bars.track(range(rounds + 1), description=name):
                    requests = _make_requests(load, headers, numbers)
                    ours_now = await put_load(
                        stack_port(stack), iter(requests), connections=load.connections, check=_check_accepted(load)
                    )
                    bare_now = await put_load(
                        bare_port, iter(requests), connections=load.connections, check=_check_read
                    )
                    if turn:  # the first round warms up
                        ours.append(ours_now)
                        bare.append(bare_now)
            expected = next(numbers)
            await _check_ledger(stack, expected)
    rate = int(median(result.per_second for result in ours))
    yardstick = int(median(result.per_second for result in bare))
    middle = sorted(ours, key=lambda result: result.per_second)[len(ours) // 2]
    return {
        "benchmark": name,
        "requests_per_second": rate,
        "events_per_second": rate * load.events,
        "yardstick_requests_per_second": yardstick,
        "ratio": f"{rate / yardstick:.2f}",
        "p50_ms": middle.percentile_ms(50),
        "p95_ms": middle.percentile_ms(95),
        "p99_ms": middle.percentile_ms(99),
        "spread": f"{min(r.per_second for r in ours)}-{max(r.per_second for r in ours)}",
        "events_checked": expected,
    }


def stack_port(stack: Stack) -> int:
    """The port of the stack's API."""
    return int(stack.environment["TALLYSTICK_PORT"])


async def _start_bare(stack: Stack) -> int:
    port = claim_port(0, BARE_PORT_NAME)
    await stack.start_command(BARE_PORT_NAME, sys.executable, "-m", "benchmarks.bare", str(port))
    for _ in range(200):
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            await asyncio.sleep(0.05)
        else:
            writer.close()
            return port
    raise RuntimeError("the bare server did not start")


def _make_requests(load: Load, headers: dict[str, str], numbers: "count[int]") -> list[bytes]:
    at = (datetime.now(UTC) - timedelta(hours=2)).isoformat()
    return [
        make_request(
            "/v1/usage",
            json.dumps(
                [
                    {
                        "id": f"event-{number:012}",
                        "customer": CUSTOMERS[number % len(CUSTOMERS)],
                        "meter": METER,
                        "value": "1.25",
                        "timestamp": at,
                    }
                    for number in (next(numbers) for _ in range(load.events))
                ]
            ).encode(),
            headers,
        )
        for _ in range(load.requests)
    ]


def _check_accepted(load: Load) -> Callable[[int, bytes], None]:
    def check(status: int, body: bytes) -> None:
        if status != 202 or json.loads(body)["accepted"] != load.events:
            raise RuntimeError(f"{status}: {body[:300]!r}")

    return check


def _check_read(status: int, body: bytes) -> None:
    if status != 202:
        raise RuntimeError(f"{status}: {body[:300]!r}")


async def _check_ledger(stack: Stack, expected: int) -> None:
    """Everything that was accepted is in the ledger, once."""
    async with open_resources(stack.settings(), application_name="benchmarks") as resources:
        await drain(resources, datetime.now(UTC), reclaim_after=timedelta(0))
        async with db.transaction(resources.engine) as connection:
            counted = await count_conservation(connection)
    if counted.events != expected or counted.difference:
        raise RuntimeError(f"{expected} events were accepted, {counted.events} are in the ledger")


def main() -> None:
    """Read the arguments, measure, print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.partition("\n")[0])
    parser.add_argument("name", choices=LOADS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    figures = asyncio.run(measure(arguments.name, arguments.rounds, Console(stderr=True)))
    if arguments.json:
        print(json.dumps(figures, ensure_ascii=False))
        return
    table = Table("what", "measured", box=None)
    for what, measured in figures.items():
        table.add_row(what.replace("_", " "), str(measured))
    Console().print(table)


if __name__ == "__main__":
    main()
