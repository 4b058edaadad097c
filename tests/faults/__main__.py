"""`python -m tests.faults`: see docs/faults.md."""

import argparse
import asyncio
import json
import logging
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

import structlog
import uvloop
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from tests.faults.load import compare_loads
from tests.faults.run import run_faults
from tests.faults.schedule import draw
from tests.faults.soak import soak

out, err = Console(), Console(stderr=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description="Faults on real processes, and checks.")
    parser.add_argument("--minutes", type=float, default=1.0, help="how long faults strike (default 1)")
    parser.add_argument("--seed", type=int, default=1, help="which sequence of faults (default 1)")
    parser.add_argument("--load", action="store_true", help="instead: half load against overload")
    parser.add_argument("--soak", type=float, metavar="MINUTES", help="instead: a steady load for so long")
    parser.add_argument("--json", action="store_true", help="the report as JSON on standard output")
    parser.add_argument("--keep", type=Path, help="a folder for logs and data, which is kept")
    options = parser.parse_args()
    # What the product's own functions log while the harness calls them; its processes log into files.
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    folder = options.keep or Path(tempfile.mkdtemp(prefix="tallystick-faults-"))
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            report = runner.run(_run(folder, options))
    except (KeyboardInterrupt, asyncio.CancelledError):
        err.print("interrupted; everything that was started has been ended")
        sys.exit(130)
    finally:
        if options.keep is None:
            shutil.rmtree(folder, ignore_errors=True)
    if options.json or options.load or options.soak:
        out.print_json(json.dumps(report))
    else:
        show(report)
    sys.exit(0 if report["verdict"] == "good" else 1)


async def _run(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    task = asyncio.current_task()
    assert task is not None
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=err, transient=True) as bars:
        bar = bars.add_task("starting", total=1.0)

        def step(text: str, done: float) -> None:
            bars.update(bar, description=text, completed=done)

        if options.load:
            return await compare_loads(folder, step)
        if options.soak:
            return await soak(folder, options.soak * 60, step)
        seconds = options.minutes * 60
        return (await run_faults(folder, draw(options.seed), seconds=seconds, seed=options.seed, step=step)).as_json()


def show(report: dict[str, Any]) -> None:
    """The report for people."""
    table = Table("fault", "times", box=None, pad_edge=False)
    table.columns[1].justify = "right"
    for kind, number in report["faults_by_kind"].items():
        table.add_row(kind, str(number))
    table.add_row("together", str(report["faults"]))
    table.add_row("not counted, for they met nothing", str(sum(report["met_nothing"].values())))
    out.print(table)
    events, webhooks = report["events"], report["webhooks"]
    out.print(f"\nevents    {events['accepted']} accepted, {events['lost']} lost, {events['doubled']} doubled")
    out.print(f"webhooks  {webhooks['acknowledged']} acknowledged, {webhooks['lost']} of {webhooks['events']} lost")
    for name in ("seconds_until_accepted", "seconds_until_well"):
        if spread := report[name]:
            out.print(f"{name.replace('_', ' ')}: median {spread['median']}, at most {spread['max']}")
    out.print(f"seconds until nothing waited any more: {report['seconds_until_settled']}")
    for line in (*report["broken"], *report["webhooks_lost"], *report["errors"]):
        out.print(f"[bold red]broken[/]  {line}")
    for line in report["shortcomings"]:
        out.print(f"[bold red]too little[/]  {line}")
    out.print(f"verdict: {report['verdict']} (seed {report['seed']})")


if __name__ == "__main__":
    main()
