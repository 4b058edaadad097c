"""Background work: every loop is `every(run_once)`. Tests and commands call `run_once` themselves."""

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from time import time
from typing import Any, TypeVar

import structlog
from redis.asyncio import Redis
from structlog.contextvars import bind_contextvars

from tallystick import tracing
from tallystick.logs import describe_error
from tallystick.metrics import LOOP_LAST_DONE, LOOP_RUNS
from tallystick.redis_client import KEY_TAG, REDIS_ERRORS
from tallystick.resources import Resources

log = structlog.get_logger()

# A loop that fails again and again still tries this often: the cause is mostly a part that will come back.
MAX_PAUSE_SECONDS = 30

# Below the half minute after which most supervisors kill. A run that goes on for as long as there is work may have
# work for hours; one that is cut short leaves what a killed worker leaves, which the next one takes over.
STOP_WITHIN_SECONDS = 20

# Loop → unix time at which some worker's last run of it ended well. For the doctor, which may run on another machine.
LAST_DONE = f"{KEY_TAG}:loops"
NOTE_EVERY_SECONDS = 10


Result = TypeVar("Result")


async def all_ended(parts: Iterable[Awaitable[Result]]) -> list[Result]:
    """Run the parts of a run side by side; what they came to. When one failed, the first failure, once all have ended.

    A part that went on alone would meet the next run, or the end of the connections.
    """
    outcomes = await asyncio.gather(*parts, return_exceptions=True)
    results: list[Result] = []
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome
        results.append(outcome)
    return results


@dataclass(frozen=True)
class Loop:
    """`run_once(resources, now)` does what is due and says how many things it did."""

    name: str
    every_seconds: float
    run_once: Callable[[Resources, datetime], Awaitable[int]]
    # For a run that mostly waits for Stripe, by pauses of its own, and goes on another time where it was.
    stops_at_once: bool = False


async def run_loops(resources: Resources, loops: Sequence[Loop], stop: asyncio.Event) -> None:
    """Run all loops side by side until `stop` is set; each finishes the run that it is in, if it does so in time."""
    async with asyncio.TaskGroup() as group:
        done: dict[str, int] = {}
        running = [group.create_task(_run_loop(resources, loop, stop, done), name=loop.name) for loop in loops]
        group.create_task(_note_done(resources.redis, done, stop))
        await stop.wait()
        for loop, task in zip(loops, running, strict=True):
            if loop.stops_at_once:
                task.cancel()
        _, unfinished = await asyncio.wait(running, timeout=STOP_WITHIN_SECONDS)
        for task in unfinished:
            log.warning("loop_cut_short", loop=task.get_name())
            task.cancel()


async def _run_loop(resources: Resources, loop: Loop, stop: asyncio.Event, ended: dict[str, int]) -> None:
    bind_contextvars(loop=loop.name)
    failures = 0
    while not stop.is_set():
        try:
            with tracing.span(loop.name) as span:
                done = await loop.run_once(resources, datetime.now(UTC))
                span.set_attribute(tracing.DONE, done)
        except Exception as error:  # noqa: BLE001  the loop's edge: whatever went wrong, the next run starts from what is committed
            failures += 1
            LOOP_RUNS.labels(loop.name, "failed").inc()
            log.warning("loop_failed", failures=failures, **describe_error(error))
        else:
            failures = 0
            ended[loop.name] = int(time())
            LOOP_RUNS.labels(loop.name, "done").inc()
            LOOP_LAST_DONE.labels(loop.name).set(ended[loop.name])
            if done:
                log.info("loop_ran", done=done)
        # After hours of failures 2**failures is more than a float holds.
        pause = min(loop.every_seconds * 2 ** min(failures, 16), max(MAX_PAUSE_SECONDS, loop.every_seconds))
        # Several workers that were started together must not come for the same rows at the same moments for ever.
        await _wait(stop, pause * random.uniform(0.8, 1.0))


async def _note_done(redis: Redis, ended: dict[str, int], stop: asyncio.Event) -> None:
    """Write down, for all workers together, which loops have run since this was last done."""
    while not stop.is_set():
        await _wait(stop, NOTE_EVERY_SECONDS)
        # Those of this process only as far as they are new: another worker's may be later.
        noting: Any = dict(ended)
        ended.clear()
        try:
            if noting:
                await redis.hset(LAST_DONE, mapping=noting)
        except REDIS_ERRORS:
            continue  # the loops that need Redis say that it is away, and the next runs are noted in their turn


async def read_last_done(redis: Redis) -> dict[str, datetime]:
    """When each loop last ended well, on any worker, to some ten seconds. Raises Redis's errors."""
    noted: Any = await redis.hgetall(LAST_DONE)
    return {name.decode(): datetime.fromtimestamp(int(at), UTC) for name, at in noted.items()}


async def _wait(stop: asyncio.Event, seconds: float) -> None:
    try:
        async with asyncio.timeout(seconds):
            await stop.wait()
    except TimeoutError:
        return
