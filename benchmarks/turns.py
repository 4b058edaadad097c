"""Rounds in turn: a flow and its yardstick one after the other, so that what else the machine does meets both."""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from benchmarks.load import Check, Result, put_load
from benchmarks.report import Side
from benchmarks.rig import Rig

Run = Callable[[], Awaitable[Result]]


@dataclass(frozen=True)
class Lane:
    """What takes a turn. `prepare(seconds)` makes ready, unmeasured, for a run of about that length."""

    side: Side
    prepare: Callable[[float], Run]
    settle: Callable[[], Awaitable[None]] | None = None


async def take_turns(rig: Rig, lanes: Sequence[Lane], description: str) -> None:
    """Run all lanes `rig.rounds` times, and once before that to warm up; their sides gather what was measured."""
    for turn in rig.bars.track(range(rig.rounds + 1), description=description):
        for lane in lanes:
            run = lane.prepare(rig.seconds)
            side = lane.side if turn else Side("warming up", lane.side.unit)
            async with rig.measured(side):
                result = await run()
            side.rates.append(result.per_second)
            side.latencies += result.latencies
            if lane.settle is not None:
                await lane.settle()


def http_lane(
    side: Side,
    ports: Sequence[int],
    make: Callable[[int], Sequence[bytes]],
    check: Check,
    *,
    connections: int,
    first_guess: int,
    settle: Callable[[], Awaitable[None]] | None = None,
) -> Lane:
    """A lane of prebuilt requests: as many of them as the round before says are answered in its time."""
    per_second: float = first_guess

    def prepare(seconds: float) -> Run:
        requests = make(max(connections, int(per_second * seconds)))

        async def run() -> Result:
            nonlocal per_second
            result = await put_load(ports, requests, connections=connections, check=check)
            per_second = result.per_second
            return result

        return run

    return Lane(side, prepare, settle)
