"""Background work: every loop is `every(run_once)`. Tests and commands call `run_once` themselves."""

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import structlog

from tallystick.metrics import LOOP_RUNS
from tallystick.resources import Resources

log = structlog.get_logger()

# A loop that fails again and again still tries this often: the cause is mostly a part that will come back.
MAX_PAUSE_SECONDS = 30


@dataclass(frozen=True)
class Loop:
    """`run_once(resources, now)` does what is due and says how many things it did."""

    name: str
    every_seconds: float
    run_once: Callable[[Resources, datetime], Awaitable[int]]


async def run_loops(resources: Resources, loops: Sequence[Loop], stop: asyncio.Event) -> None:
    """Run all loops side by side until `stop` is set; each finishes the run that it is in."""
    async with asyncio.TaskGroup() as group:
        for loop in loops:
            group.create_task(_run_loop(resources, loop, stop), name=loop.name)


async def _run_loop(resources: Resources, loop: Loop, stop: asyncio.Event) -> None:
    failures = 0
    while not stop.is_set():
        try:
            done = await loop.run_once(resources, datetime.now(UTC))
        except Exception as error:  # noqa: BLE001  the loop's edge: whatever went wrong, the next run starts from what is committed
            failures += 1
            LOOP_RUNS.labels(loop.name, "failed").inc()
            log.warning(
                "loop_failed", loop=loop.name, failures=failures, error=type(error).__name__, detail=_brief(error)
            )
        else:
            failures = 0
            LOOP_RUNS.labels(loop.name, "done").inc()
            if done:
                log.info("loop_ran", loop=loop.name, done=done)
        pause = min(loop.every_seconds * 2**failures, max(MAX_PAUSE_SECONDS, loop.every_seconds))
        # Several workers that were started together must not come for the same rows at the same moments for ever.
        await _wait(stop, pause * random.uniform(0.8, 1.0))


async def _wait(stop: asyncio.Event, seconds: float) -> None:
    try:
        async with asyncio.timeout(seconds):
            await stop.wait()
    except TimeoutError:
        return


def _brief(error: Exception) -> str:
    """The first line of an error's text: SQL statements and their parameters come after it."""
    return str(error).partition("\n")[0][:200]
