"""`python -m benchmarks NAME`: measure, compare with a yardstick in the same run, and check that nothing is missing."""

import argparse
import json
import signal
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from benchmarks.access import measure_access
from benchmarks.flush import measure_flush
from benchmarks.growth import measure_growth
from benchmarks.load import WrongAnswer
from benchmarks.memory import measure_memory
from benchmarks.query import measure_query
from benchmarks.report import CheckFailed, Report, print_reports
from benchmarks.rig import Rig, open_rig
from benchmarks.usage import measure_batch, measure_single, measure_sustained
from benchmarks.webhooks import measure_webhooks
from tallystick.terminal import run_async


@dataclass(frozen=True)
class Benchmark:
    """How to measure, and how much when nobody says otherwise."""

    measure: Callable[[Rig], Awaitable[Report]]
    rounds: int
    seconds: float
    sizes: tuple[int, ...] = ()


BENCHMARKS = {
    "webhooks": Benchmark(measure_webhooks, 5, 3),
    "usage-batch": Benchmark(measure_batch, 5, 2),
    "usage-single": Benchmark(measure_single, 5, 3),
    "usage-sustained": Benchmark(measure_sustained, 1, 60),
    "flush": Benchmark(measure_flush, 3, 0, (5_000,)),
    "access": Benchmark(measure_access, 5, 3, (1_000,)),
    "query": Benchmark(measure_query, 3, 2, (30, 100, 300)),
    "growth": Benchmark(measure_growth, 3, 1, (200_000, 1_000_000, 3_000_000)),
    "memory": Benchmark(measure_memory, 1, 0, (1_000_000,)),
}


async def run_benchmark(name: str, arguments: argparse.Namespace, console: Console) -> Report:
    """One benchmark on a rig of its own."""
    benchmark = BENCHMARKS[name]
    with Progress(console=console) as bars:
        async with open_rig(
            console,
            bars,
            rounds=arguments.rounds or benchmark.rounds,
            seconds=arguments.seconds or benchmark.seconds,
            sizes=arguments.sizes or benchmark.sizes,
            sync_engine=arguments.sync_engine and arguments.sync_engine.resolve(),
        ) as rig:
            return await benchmark.measure(rig)


def main() -> None:
    """Read the arguments, measure, print. Ends with 1 when something is missing or counted twice."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.partition("\n")[0])
    parser.add_argument("name", choices=[*BENCHMARKS, "all"])
    parser.add_argument("--rounds", type=int, help="how often each side is measured")
    parser.add_argument("--seconds", type=float, help="about how long a round is")
    parser.add_argument("--sizes", type=_read_sizes, help="amounts of data, with commas: 1000000,5000000,20000000")
    parser.add_argument(
        "--sync-engine",
        type=Path,
        metavar="FOLDER",
        help="where Stripe's sync-engine is installed: `webhooks` runs it too",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    arguments = parser.parse_args()
    console = Console(stderr=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what was started is stopped then, as by Ctrl-C
    names = list(BENCHMARKS) if arguments.name == "all" else [arguments.name]
    try:
        reports = [run_async(run_benchmark(name, arguments, console)) for name in names]
    except (CheckFailed, WrongAnswer) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    except KeyboardInterrupt:
        sys.exit("Interrupted; everything that was started is stopped.")
    if arguments.json:
        print(json.dumps([report.figures() for report in reports], ensure_ascii=False, indent=2))
    else:
        print_reports(reports, Console())


def _read_sizes(argument: str) -> tuple[int, ...]:
    return tuple(int(size) for size in argument.split(","))


if __name__ == "__main__":
    main()
