"""The command line: one command a purpose, output for people, `--json` for programs.

run, demo, fake-stripe       development: everything embedded, nothing to install
serve, worker, migrate       production
flush, keys                  operation
reconcile, periods           the proof, and what is urgent (usage/reports.py)
corrections                  usage that was taken back too late (usage/correction_commands.py)
parked                       usage that Stripe will not be told as it is (usage/commands.py)
recover, replay, sync        repair (webhooks/commands.py), with webhooks setup and doctor
"""

import asyncio
import contextlib
import gc
import json
import signal
import sys
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from tallystick import __version__
from tallystick.access.commands import app as access
from tallystick.errors import TallystickError
from tallystick.keys import app as keys
from tallystick.notifications.commands import app as notifications
from tallystick.terminal import Json, claim_port, err, fail, failures_in_one_line, out, run_async, with_resources
from tallystick.usage.commands import app as parked
from tallystick.usage.correction_commands import app as corrections
from tallystick.usage.reports import app as reports
from tallystick.webhooks.commands import app as repair

app = typer.Typer(
    help="Usage-based billing beside Stripe: what was accepted is billed exactly once, and it can be proved.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(keys, name="keys")
app.add_typer(access, name="access")
app.add_typer(notifications, name="notifications")
app.add_typer(corrections, name="corrections")
app.add_typer(parked, name="parked")
app.add_typer(repair)
app.add_typer(reports)

DataFolder = Annotated[Path, typer.Option("--data", help="Where the embedded parts keep their data.")]

# How many objects a process makes, beyond those that it frees, until the collector looks at the new ones. It is 700
# unless set, which is a few requests, and a fifth of the time to load a process is the collector's; a request of 1,000
# events holds some ten thousand at once.
YOUNG_OBJECTS = 20_000


def main() -> None:
    """Entry point: errors raised on purpose end in one line on standard error and exit code 1."""
    gc.set_threshold(YOUNG_OBJECTS)
    try:
        app()
    except TallystickError as error:
        fail(str(error))


def _print_version(wanted: bool) -> None:
    if wanted:
        out.print(f"tallystick {__version__}")
        raise typer.Exit


PrintVersion = Annotated[
    bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
]


@app.callback()
def options(version: PrintVersion = False) -> None:
    """What may stand before a command."""


@app.command()
def run(data: DataFolder = Path(".tallystick")) -> None:
    """Start everything on this machine: PostgreSQL, Valkey, a fake Stripe, the API and a worker. Ctrl-C stops it.

    With STRIPE_API_KEY and STRIPE_WEBHOOK_SECRET set it talks to Stripe instead of the fake one; with DATABASE_URL or
    REDIS_URL set it uses those servers instead of its own.
    """
    from tallystick.dev.stack import run_until_stopped

    with failures_in_one_line():
        _run_until_signal(lambda stop: run_until_stopped(data.resolve(), stop, out))


@app.command()
def demo(
    seed: Annotated[int, typer.Option(help="The same seed plays the same month.")] = 1,
    customers: Annotated[int, typer.Option(min=3, max=200, help="How many customers.")] = 12,
    json_: Json = False,
) -> None:
    """Play a month of business on embedded parts and prove that every invoice equals what was accepted."""
    from tallystick.dev.demo import play_month

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the parts are stopped then, as by Ctrl-C
    report = run_async(play_month(seed=seed, customers=customers, console=err))
    if json_:
        out.print_json(json.dumps(report.as_json()))
    else:
        report.print(out)
    sys.exit(0 if report.good else 1)


@app.command("fake-stripe")
def fake_stripe(
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port to listen on.")] = 12111,
    state: Annotated[Path | None, typer.Option(help="Keep its state in this file; without it, in memory.")] = None,
    seed: Annotated[int, typer.Option(help="For its ids and its misbehaviour.")] = 0,
) -> None:
    """Run only the fake Stripe, to develop against without an account (see docs/fake-stripe.md)."""
    from tallystick.dev.fake_stripe.server import serve_fake_stripe

    port = claim_port(port, "--port", host)
    where = f"The fake Stripe is at http://{host}:{port}; Ctrl-C ends it."
    serve_fake_stripe(host, port, state, seed, lambda: err.print(where, markup=False))


# For the requests that were begun when a process is to stop: longer than one that waits for its commit may take (see
# db.py). With what inbox.py and resources.py add to it, a process ends within 25 s.
ANSWER_WITHIN_SECONDS = 15

# Far more connections than one process can serve.
MAX_OPEN_FILES = 65_536


@app.command()
def serve() -> None:
    """Serve the HTTP API on TALLYSTICK_HOST and TALLYSTICK_PORT."""
    import resource

    import uvicorn

    from tallystick.app import create_app
    from tallystick.config import load_settings
    from tallystick.connections import Connection
    from tallystick.logs import configure_logs
    from tallystick.rules import load_rules

    settings = load_settings(to_serve=True)
    # The application reads them again when it starts, where what is wrong would end in a traceback of the server's.
    load_rules(settings.rules_file)
    claim_port(settings.port, "TALLYSTICK_PORT", settings.host)
    configure_logs(settings.log_level)
    # Each connection is an open file. Some systems allow 1,024 unless asked, which idle ones alone could use up.
    files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_OPEN_FILES if most == resource.RLIM_INFINITY else min(most, MAX_OPEN_FILES)
    with contextlib.suppress(OSError, ValueError):  # the system may allow fewer than it says
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(files, wanted), most))
    app = create_app(settings)
    _spare_collector()
    uvicorn.run(
        app,
        host=settings.host,
        port=settings.port,
        loop="uvloop",
        http=Connection,
        log_config=None,
        access_log=False,
        server_header=False,
        # Who called, and by which scheme, is asked nowhere: what a proxy says of it need not be read.
        proxy_headers=False,
        timeout_graceful_shutdown=ANSWER_WITHIN_SECONDS,
        # Above the usual 60 s of load balancers: whoever closes first must not be us, in the middle of a request.
        timeout_keep_alive=75,
    )


@app.command()
def worker() -> None:
    """Run the background loops: ledger, sealing, deliveries to Stripe, refreshing the mirror."""
    from prometheus_client import start_http_server

    from tallystick.config import load_settings
    from tallystick.logs import configure_logs
    from tallystick.metrics import REGISTRY
    from tallystick.worker import run_worker

    settings = load_settings()
    if settings.worker_metrics_port:
        claim_port(settings.worker_metrics_port, "TALLYSTICK_WORKER_METRICS_PORT", settings.host)
    configure_logs(settings.log_level)
    _spare_collector()
    if settings.worker_metrics_port:
        start_http_server(settings.worker_metrics_port, settings.host, REGISTRY)
    _run_until_signal(lambda stop: run_worker(settings, stop))


@app.command()
def migrate() -> None:
    """Bring the database's schema up to date and make the ledger's next partitions."""

    async def work(resources: Any) -> None:
        from tallystick import db, schema
        from tallystick.usage.partitions import make_partitions

        await schema.migrate(resources.engine)
        async with db.transaction(resources.engine) as connection:
            await make_partitions(connection, datetime.now(UTC))

    with_resources(work)
    out.print("The database is up to date.")


@app.command()
def flush(json_: Json = False) -> None:
    """Send all usage to Stripe now: drain, seal every total, deliver what is due."""

    async def work(resources: Any) -> dict[str, int]:
        from tallystick.usage.flush import flush

        with err.status("sealing, and sending to Stripe"):
            return asdict(await flush(resources, datetime.now(UTC)))

    done = with_resources(work)
    if json_:
        out.print_json(json.dumps(done))
    else:
        out.print(f"Sealed {done['sealed']} totals; tried {done['tried']} deliveries.")


@app.command()
def doctor(json_: Json = False) -> None:
    """Look at every part that is needed: `ok`, `look`, or how to mend it. Exit code 1 if something is wrong."""
    from tallystick.doctor import examine

    with err.status("examining"):
        findings = run_async(examine())
    if json_:
        out.print_json(json.dumps([finding.as_json() for finding in findings]))
    else:
        for finding in findings:
            well = "[yellow]look [/]" if finding.notable else "[green]ok   [/]"
            out.print(well if finding.good else "[bold red]wrong[/]", end="  ")
            out.print(f"{finding.part}: {finding.text}", markup=False)
    sys.exit(0 if all(finding.good for finding in findings) else 1)


def _spare_collector() -> None:
    """Keep the garbage collector from going through what will never be garbage.

    The imports leave some 150,000 objects. Each full collection goes through all of them, 100 ms in which nobody is
    answered, and a request makes enough objects to cause the next one soon. Objects that do not refer to each other in
    circles, which is nearly all, are freed at once without the collector.
    """
    gc.collect()
    gc.freeze()


def _run_until_signal(work: Callable[[asyncio.Event], Awaitable[None]]) -> None:
    """Run `work(stop)`; SIGINT and SIGTERM set `stop`, and the work ends what it has begun."""

    async def call() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop.set)
        await work(stop)

    run_async(call())
