"""A steady load for minutes: memory, connections and lag must stay flat."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import linear_regression
from time import monotonic
from typing import Any

from sqlalchemy import text

from tallystick import db
from tallystick.resources import Resources, open_resources
from tallystick.usage.buffer import STREAM
from tests.faults.load import prepare, put_load, resident_bytes
from tests.faults.machine import Machine, open_machine

REQUESTS_PER_SECOND = 40
CONNECTIONS = 8
SAMPLE_SECONDS = 2.0
# Caches fill and pools grow at first; what counts comes after this part of the time.
WARMING = 0.4
# What may be added in an hour, by the slope of a line through the samples. Less cannot be told from noise in minutes.
ALLOWED_PER_HOUR = {"memory_mb": 60.0, "open_files": 60.0, "waiting_batches": 100.0, "lag_seconds": 60.0}

# The share of what was to be asked that may be refused, break, or not come to be asked: a soak is no overload.
ALLOWED_REFUSED = 0.01
# A line through fewer samples says nothing.
ENOUGH_SAMPLES = 10

OLDEST = text("""
    SELECT coalesce(extract(epoch FROM now() - min(created_at)), 0)
      FROM usage_deliveries WHERE state IN ('pending', 'sending')
""")


async def soak(folder: Path, seconds: float, report: Callable[[str, float], None]) -> dict[str, Any]:
    """Post at a steady rate to both API processes; each quantity's slope, and a verdict."""
    async with (
        open_machine(folder) as machine,
        open_resources(machine.direct_settings(), application_name="faults") as resources,
    ):
        key = await prepare(machine)
        samples: dict[str, list[tuple[float, float]]] = {}
        began = monotonic()
        loads = [
            asyncio.create_task(
                put_load(
                    machine.ports[part], key, connections=CONNECTIONS, seconds=seconds, per_second=REQUESTS_PER_SECOND
                )
            )
            for part in ("api-1", "api-2")
        ]
        while not all(load.done() for load in loads):
            await asyncio.sleep(SAMPLE_SECONDS)
            at = monotonic() - began
            for name, value in (await _sample(machine, resources)).items():
                samples.setdefault(name, []).append((at, value))
            report(f"{sum(values[-1][1] for name, values in samples.items() if 'memory' in name):.0f} MB", at / seconds)
        answers = [await load for load in loads]
    requests = sum(len(load.accepted) for load in answers)
    due = round(seconds * REQUESTS_PER_SECOND * len(answers))
    warm = {name: [(at, value) for at, value in values if at >= seconds * WARMING] for name, values in samples.items()}
    slopes = {name: slope_per_hour(values) for name, values in warm.items()}
    shortcomings = judge(due, requests, min(len(values) for values in warm.values()), slopes)
    return {
        "seconds": round(seconds),
        "due": due,
        "requests": requests,
        "refused": sum(len(load.refused) + load.broken for load in answers),
        "first_and_last": {name: [round(values[0][1], 1), round(values[-1][1], 1)] for name, values in samples.items()},
        "slope_per_hour": {name: round(slope, 1) for name, slope in slopes.items()},
        "shortcomings": shortcomings,
        "verdict": "broken" if shortcomings else "good",
    }


def judge(due: int, accepted: int, samples: int, slopes: Mapping[str, float]) -> list[str]:
    """What keeps a soak from being good: too few requests accepted of those due, too few samples, what grows."""
    found = [
        f"{name} grows by {slope:.1f} an hour"
        for name, slope in slopes.items()
        if slope > ALLOWED_PER_HOUR[name.split(" ")[0]]
    ]
    if accepted < due * (1 - ALLOWED_REFUSED) or not accepted:
        found.append(f"{accepted} of {due} requests were accepted")
    if samples < ENOUGH_SAMPLES:
        found.append(f"{samples} samples are too few for a slope")
    return found


async def _sample(machine: Machine, resources: Resources) -> dict[str, float]:
    taken: dict[str, float] = {}
    for part in machine.processes:
        if part != "stripe":
            pid = machine.pid(part)
            taken[f"memory_mb {part}"] = resident_bytes(pid) / 2**20
            taken[f"open_files {part}"] = float(len(list(Path(f"/proc/{pid}/fd").iterdir())))
    taken["waiting_batches"] = float(await resources.redis.xlen(STREAM))
    async with db.transaction(resources.engine) as connection:
        taken["lag_seconds"] = float(await connection.scalar(OLDEST) or 0)
    return taken


def slope_per_hour(values: Sequence[tuple[float, float]]) -> float:
    """The slope of the line through (seconds, value); 0 where there is none."""
    return linear_regression(*zip(*values, strict=True)).slope * 3600 if len(values) > 1 else 0.0
