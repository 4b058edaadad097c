"""A steady load for minutes: memory, connections and lag must stay flat."""

import asyncio
from collections.abc import Callable
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
    slopes = {name: _slope_per_hour(values, seconds) for name, values in samples.items()}
    growing = [name for name, slope in slopes.items() if slope > ALLOWED_PER_HOUR[name.split(" ")[0]]]
    return {
        "seconds": round(seconds),
        "requests": sum(len(load.accepted) for load in answers),
        "refused": sum(len(load.refused) + load.broken for load in answers),
        "first_and_last": {name: [round(values[0][1], 1), round(values[-1][1], 1)] for name, values in samples.items()},
        "slope_per_hour": {name: round(slope, 1) for name, slope in slopes.items()},
        "growing": growing,
        "verdict": "broken" if growing else "good",
    }


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


def _slope_per_hour(values: list[tuple[float, float]], seconds: float) -> float:
    warm = [(at, value) for at, value in values if at >= seconds * WARMING]
    if len(warm) < 2:
        return 0.0
    return linear_regression([at for at, _ in warm], [value for _, value in warm]).slope * 3600
