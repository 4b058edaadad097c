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
# What must be accepted of that which is accepted at full load: a service that refuses nearly all is quick, and no use.
LEAST_SHARE = 1 / 3
# With fewer answers in a turn, less than ten are slower than its 99th percentile, which then is a matter of chance.
ENOUGH = 1_000

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

    @property
    def accepted_per_second(self) -> float:
        return len(self.accepted) / self.seconds

    def as_json(self) -> dict[str, Any]:
        return {
            "accepted_per_second": round(self.accepted_per_second),
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


@dataclass
class Comparison:
    """Half load and overload in turns, after one turn of as much as can be done."""

    full: Load
    halves: list[Load] = field(default_factory=list)
    overs: list[Load] = field(default_factory=list)

    @property
    def p99_ms(self) -> tuple[float, float]:
        """Of what was accepted at half load and at overload, by the medians of the turns."""
        half, over = (median(p99_ms(load.accepted) for load in loads) for loads in (self.halves, self.overs))
        return half, over

    @property
    def share(self) -> float:
        """What was accepted at overload, in a second, of that which was accepted at full load."""
        return median(load.accepted_per_second for load in self.overs) / max(1.0, self.full.accepted_per_second)

    def shortcomings(self, enough: int = ENOUGH) -> list[str]:
        """What keeps it from being good. `enough`: how many answers a turn must have."""
        half, over = self.p99_ms
        loads = [self.full, *self.halves, *self.overs]
        fewest = min(len(load.accepted) for load in loads)
        broken = sum(load.broken for load in loads)
        untold = sum(load.without_retry_after for load in loads)
        refused_at_half = sum(len(load.refused) for load in self.halves)
        found = {
            f"the p99 at overload is {over} ms, more than {ALLOWED_RATIO} times the {half} ms at half load": (
                over > ALLOWED_RATIO * half
            ),
            f"at overload {self.share:.0%} of what full load accepts are accepted, less than {LEAST_SHARE:.0%}": (
                self.share < LEAST_SHARE
            ),
            f"{fewest} accepted in a turn are too few for a p99: {enough} are needed": fewest < enough,
            f"{broken} connections were broken": broken > 0,
            f"{untold} were refused and not told when to come again": untold > 0,
            f"{refused_at_half} were refused at half load": refused_at_half > 0,
            "nothing was refused in a turn of overload, so it was none": not all(load.refused for load in self.overs),
        }
        return [shortcoming for shortcoming, holds in found.items() if holds]


async def compare(
    port: int, key: str, *, turns: int, seconds: float, pid: int | None = None, step: Callable[[str, float], None]
) -> Comparison:
    """Full load once, then half of what it accepted and far too much, in turns of so many seconds."""
    step("as much as it can do", 0.1)
    compared = Comparison(await put_load(port, key, connections=SATURATING, seconds=seconds, pid=pid))
    rate = compared.full.accepted_per_second / 2
    for turn in range(turns):
        step(f"half of that, {turn + 1} of {turns}", (turn + 0.3) / turns)
        compared.halves.append(
            await put_load(port, key, connections=SATURATING, seconds=seconds, per_second=rate, pid=pid)
        )
        step(f"far too much, {turn + 1} of {turns}", (turn + 0.6) / turns)
        compared.overs.append(await put_load(port, key, connections=OVERLOADING, seconds=seconds, pid=pid))
    return compared


async def compare_loads(folder: Path, step: Callable[[str, float], None]) -> dict[str, Any]:
    """Half load against overload, in turns within one run: `python -m tests.faults --load`."""
    async with open_machine(folder, apis=1, workers=1) as machine:
        key = await prepare(machine)
        port, pid = machine.ports["api-1"], machine.pid("api-1")
        step("warming up", 0.05)
        await put_load(port, key, connections=4, seconds=2, pid=pid)  # keys, meters, connections: all are known
        compared = await compare(port, key, turns=TURNS, seconds=TURN_SECONDS, pid=pid, step=step)
    half, over = compared.p99_ms
    shortcomings = compared.shortcomings()
    return {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "saturated": compared.full.as_json(),
        "half": [load.as_json() for load in compared.halves],
        "overload": [load.as_json() for load in compared.overs],
        "median_p99_ms": {"half": round(half, 1), "overload": round(over, 1)},
        "p99_ratio": round(over / max(0.1, half), 1),
        "accepted_share": round(compared.share, 2),
        "shortcomings": shortcomings,
        "verdict": "broken" if shortcomings else "good",
    }
