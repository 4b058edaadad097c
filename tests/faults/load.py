"""Load on one API process: what it does at half of what it can, and at far more than that."""

import asyncio
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import median, quantiles
from time import monotonic
from typing import Any

import httpx

from tallystick.resources import open_resources
from tests.faults.business import CUSTOMERS, open_business
from tests.faults.clients import METER
from tests.faults.machine import Machine, make_key, open_machine
from tests.faults.proxy import HOST

EVENTS_A_REQUEST = 10
SATURATING = 32
OVERLOADING = 600
# Whoever is refused comes again after this, and not after the second that he is told: an impatient crowd.
IMPATIENT_SECONDS = 0.5
TURN_SECONDS = 5.0
TURNS = 4
# How many times longer the slowest accepted requests may take at overload.
ALLOWED_RATIO = 5

_sequence = itertools.count()


@dataclass
class Load:
    """Answers by status, and how long the accepted and the refused ones took, in seconds."""

    seconds: float = 0.0
    statuses: Counter[int] = field(default_factory=Counter)
    accepted: list[float] = field(default_factory=list)
    refused: list[float] = field(default_factory=list)
    without_retry_after: int = 0
    broken: int = 0
    resident_bytes: int = 0

    def as_json(self) -> dict[str, Any]:
        return {
            "accepted_per_second": round(len(self.accepted) / self.seconds),
            "accepted_p99_ms": p99_ms(self.accepted),
            "refused_per_second": round(len(self.refused) / self.seconds),
            "refused_p99_ms": p99_ms(self.refused),
            "refused_without_retry_after": self.without_retry_after,
            "connections_broken": self.broken,
            "resident_mb": round(self.resident_bytes / 2**20, 1),
            "statuses": {str(status): number for status, number in sorted(self.statuses.items())},
        }


def p99_ms(seconds: list[float]) -> float:
    """The 99th percentile, in milliseconds."""
    return round(quantiles(seconds, n=100)[98] * 1000, 1) if len(seconds) > 1 else 0.0


def resident_bytes(pid: int | None) -> int:
    """The memory that a process holds; 0 where there is no /proc."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return int(status.partition("VmRSS:")[2].split()[0]) * 1024


def make_request(key: str) -> bytes:
    """A request with events that were never sent before."""
    body = json.dumps(
        [
            {"id": f"load-{next(_sequence)}", "customer": CUSTOMERS[number % len(CUSTOMERS)], "meter": METER}
            for number in range(EVENTS_A_REQUEST)
        ]
    ).encode()
    head = ["POST /v1/usage HTTP/1.1", f"Host: {HOST}", f"Authorization: Bearer {key}", f"Content-Length: {len(body)}"]
    return "\r\n".join(head).encode() + b"\r\n\r\n" + body


async def put_load(
    port: int, key: str, *, connections: int, seconds: float, per_second: float | None = None, pid: int | None = None
) -> Load:
    """Post over so many connections as fast as answers come, or together so often a second."""
    load = Load()
    began = monotonic()
    turns: Iterator[float] = itertools.count(0, 1 / per_second) if per_second else itertools.repeat(0)

    async def work() -> None:
        while monotonic() < began + seconds:
            try:
                reader, writer = await asyncio.open_connection(HOST, port)
            except OSError:
                load.broken += 1
                await asyncio.sleep(IMPATIENT_SECONDS)
                continue
            try:
                while (due := began + next(turns)) < began + seconds > monotonic():
                    await asyncio.sleep(max(0.0, due - monotonic()))
                    await _post(reader, writer, key, load)
            except (OSError, asyncio.IncompleteReadError):
                load.broken += 1
            finally:
                writer.close()

    async def watch() -> None:
        while True:
            load.resident_bytes = max(load.resident_bytes, resident_bytes(pid))
            await asyncio.sleep(0.2)

    watching = asyncio.create_task(watch())
    await asyncio.gather(*(work() for _ in range(connections)))
    watching.cancel()
    load.seconds = monotonic() - began
    return load


async def _post(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, key: str, load: Load) -> None:
    sent = monotonic()
    writer.write(make_request(key))
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    await reader.readexactly(int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0]))
    status, took = int(head[9:12]), monotonic() - sent
    load.statuses[status] += 1
    if status == 202:
        load.accepted.append(took)
        return
    load.refused.append(took)
    load.without_retry_after += b"\r\nretry-after: " not in head
    await asyncio.sleep(IMPATIENT_SECONDS)


async def prepare(machine: Machine) -> str:
    """Customers and a meter at Stripe, and a key that the API has seen."""
    async with (
        open_resources(machine.direct_settings(), application_name="faults") as resources,
        httpx.AsyncClient(base_url=machine.stripe_url, timeout=30) as control,
    ):
        await open_business(resources, control, 3600)
        (await control.post("/_fake/settle", json={"timeout_seconds": 20})).raise_for_status()
        return await make_key(resources, "load")


async def compare_loads(folder: Path, step: Callable[[str, float], None]) -> dict[str, Any]:
    """Half load against overload, in turns within one run: `python -m tests.faults --load`.

    Good is: what is accepted at overload has a 99th percentile of at most five times that at half load, by the medians
    of the turns, and whoever is refused is told when to come again.
    """
    async with open_machine(folder, apis=1, workers=1) as machine:
        key = await prepare(machine)
        port, pid = machine.ports["api-1"], machine.pid("api-1")
        step("warming up", 0.05)
        await put_load(port, key, connections=4, seconds=2, pid=pid)  # keys, meters, connections: all are known
        step("as much as it can do", 0.1)
        full = await put_load(port, key, connections=SATURATING, seconds=TURN_SECONDS, pid=pid)
        rate = len(full.accepted) / full.seconds
        halves, overs = [], []
        for turn in range(TURNS):
            step(f"half of that, {turn + 1} of {TURNS}", (turn + 0.3) / TURNS)
            halves.append(
                await put_load(port, key, connections=SATURATING, seconds=TURN_SECONDS, per_second=rate / 2, pid=pid)
            )
            step(f"far too much, {turn + 1} of {TURNS}", (turn + 0.6) / TURNS)
            overs.append(await put_load(port, key, connections=OVERLOADING, seconds=TURN_SECONDS, pid=pid))
    half, over = (median(p99_ms(load.accepted) for load in loads) for loads in (halves, overs))
    ratio = over / max(0.1, half)
    told = not any(load.without_retry_after for load in overs)
    return {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "saturated": full.as_json(),
        "half": [load.as_json() for load in halves],
        "overload": [load.as_json() for load in overs],
        "median_p99_ms": {"half": round(half, 1), "overload": round(over, 1)},
        "p99_ratio": round(ratio, 1),
        "verdict": "good" if ratio <= ALLOWED_RATIO and told else "broken",
    }
