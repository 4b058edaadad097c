"""Repair from the command line: recover and replay events, sync and check the mirror, set up the webhook endpoint."""

import asyncio
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from tallystick.terminal import Json, err, fail, out, print_table, progress, with_resources

if TYPE_CHECKING:
    from tallystick.resources import Resources
    from tallystick.webhooks.drift import Checked
    from tallystick.webhooks.endpoint_setup import Endpoint
    from tallystick.webhooks.recovery import RecoveryState, Run
    from tallystick.webhooks.replay import Replayed
    from tallystick.webhooks.sync import Synced

app = typer.Typer()
webhooks = typer.Typer(help="The webhook endpoint at Stripe.", no_args_is_help=True)
app.add_typer(webhooks, name="webhooks")

# While another process reads Stripe's list, this one looks from time to time whether it has stopped.
LOOK_EVERY_SECONDS = 1


@app.command()
def recover(json_: Json = False) -> None:
    """Find the events that no webhook brought, in Stripe's list of 30 days, and apply them.

    A running worker does the same each minute. Exit code 1 if an event could not be handled, or if events are lost.
    """

    async def work(resources: "Resources") -> "tuple[Run, RecoveryState]":
        from tallystick.webhooks.recovery import read_recovery, recover

        with progress(TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()) as bar:
            task = bar.add_task("reading Stripe's events", total=1)

            def report(run: "Run") -> None:
                back_to = f", back to {run.reached:%Y-%m-%d %H:%M}" if run.reached else ""
                bar.update(task, completed=run.share, description=f"{run.listed} events{back_to}")

            while (run := await recover(resources, datetime.now(UTC), report=report)).busy:
                bar.update(task, description="another process is at it; waiting")
                await asyncio.sleep(LOOK_EVERY_SECONDS)
        return run, await read_recovery(resources)

    run, state = with_resources(work)
    if json_:
        counted = {"listed": run.listed, "recovered": run.recovered, "failed": run.failed}
        out.print_json(json.dumps(counted | state.as_json()))
    else:
        out.print(f"{run.recovered} of {run.listed} listed events were missing and are applied now.")
        if state.complete_until is not None:
            out.print(f"The events are complete until {state.complete_until:%Y-%m-%d %H:%M:%S} UTC.")
    if run.failed:
        err.print(f"{run.failed} events could not be handled. They are tried again, and set aside after five failures.")
    if state.gap_from is not None and state.gap_until is not None:
        err.print(
            f"Events from {state.gap_from:%Y-%m-%d %H:%M} until {state.gap_until:%Y-%m-%d %H:%M} UTC are lost: Stripe"
            " lists 30 days only. Run: tallystick sync"
        )
    sys.exit(0 if run.done and state.gap_from is None else 1)


@app.command()
def replay(
    events: Annotated[list[str] | None, typer.Argument(metavar="EVENT…", help="Ids of events, evt_….")] = None,
    quarantined: Annotated[bool, typer.Option("--quarantined", help="All events in quarantine.")] = False,
    json_: Json = False,
) -> None:
    """Fetch events from Stripe and run them through the flow again. It is safe: an old event stays stale.

    Exit code 1 if one could not be replayed, or is still in quarantine.
    """
    if bool(events) == quarantined:
        fail("name the events to replay, or give --quarantined")

    async def work(resources: "Resources") -> "list[Replayed]":
        from tallystick.webhooks.reading import Reader
        from tallystick.webhooks.replay import find_quarantined, replay

        reader = Reader(resources)
        wanted = await find_quarantined(resources) if quarantined else list(dict.fromkeys(events or []))
        with _counting("replaying", len(wanted)) as count:
            done = []
            for position, event_id in enumerate(wanted, start=1):
                done.append(await replay(reader, event_id, datetime.now(UTC)))
                count("events", position)
        return done

    done = with_resources(work)
    if json_:
        out.print_json(json.dumps([replayed.as_json() for replayed in done]))
    else:
        table = Table("event", "before", "now", "", box=None, pad_edge=False)
        for replayed in done:
            table.add_row(replayed.id, replayed.before or "", replayed.now or "", replayed.problem or "")
        if done:
            print_table(table)
        else:
            out.print("There is nothing to replay.")
    sys.exit(1 if any(replayed.now in (None, "quarantined") for replayed in done) else 0)


@app.command()
def sync(
    all_invoices: Annotated[
        bool, typer.Option("--all-invoices", help="Not only those that are open or of the last 95 days.")
    ] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Do not go on with an interrupted run.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Compare with Stripe and change nothing.")] = False,
    sample: Annotated[
        int | None, typer.Option(min=1, help="With --check: so many objects of each list, not all.")
    ] = None,
    repair: Annotated[bool, typer.Option("--repair", help="With --check: repair what differs.")] = False,
    json_: Json = False,
) -> None:
    """Fill the mirror from Stripe's API; or, with --check, compare it field by field.

    Safe beside running services, and goes on where it was interrupted. The exit code of --check is 1 if something
    differs and was not repaired.
    """
    if (sample is not None or repair) and not check:
        fail("--sample and --repair go with --check")
    if check:
        _check(sample, all_invoices=all_invoices, repair=repair, json_=json_)

    async def work(resources: "Resources") -> "Synced":
        from tallystick.webhooks.sync import sync_mirror

        with _counting("reading", None) as count:
            now = datetime.now(UTC)
            return await sync_mirror(resources, now, all_invoices=all_invoices, restart=restart, report=count)

    synced = with_resources(work)
    if json_:
        out.print_json(json.dumps(synced.as_json()))
        return
    if synced.resumed:
        out.print("Went on with the run that was interrupted.")
    for name, objects in synced.objects.items():
        out.print(f"{objects:>9,} {name}")


def _check(sample: int | None, *, all_invoices: bool, repair: bool, json_: bool) -> None:
    async def work(resources: "Resources") -> "Checked":
        from tallystick.webhooks.drift import check_mirror

        with _counting("comparing", None) as count:
            return await check_mirror(
                resources,
                datetime.now(UTC),
                all_invoices=all_invoices,
                sample=sample,
                repair=repair,
                report=count,
            )

    checked = with_resources(work)
    if json_:
        out.print_json(json.dumps(checked.as_json(), default=_for_programs))
    else:
        table = Table("kind", "id", "field", "here", "at Stripe", "", box=None, pad_edge=False)
        for drift in checked.drift:
            for difference in drift.differences:
                values = (_shown(difference.here), _shown(difference.stripe))
                table.add_row(drift.kind, drift.id, difference.field, *values, "repaired" if drift.repaired else "")
        if checked.drift:
            print_table(table)
        compared = sum(checked.objects.values())
        out.print(f"{compared:,} objects compared, {len(checked.drift):,} differ.")
    sys.exit(0 if checked.good else 1)


@webhooks.command()
def setup(
    url: Annotated[str, typer.Option(help="Where Stripe reaches this service: https://…/webhooks/stripe")],
    new: Annotated[bool, typer.Option("--new", help="Make another one, even if there is one for this URL.")] = False,
    json_: Json = False,
) -> None:
    """Make the endpoint at Stripe, or bring it up to date: exactly the handled event types, enabled.

    The secret of a new one is printed, this once. An existing one keeps its secret.
    """

    async def work(resources: "Resources") -> "Endpoint":
        from tallystick.webhooks.endpoint_setup import set_up_endpoint

        return await set_up_endpoint(resources, url, new=new)

    endpoint = with_resources(work)
    if json_:
        out.print_json(json.dumps(endpoint.as_json()))
        return
    err.print(f"The endpoint {endpoint.id} is {endpoint.action}.")
    if endpoint.secret is not None:
        out.print(endpoint.secret)
    if endpoint.hint is not None:
        err.print(endpoint.hint)


@contextmanager
def _counting(what: str, total: int | None) -> Iterator[Callable[[str, int], None]]:
    """A bar for each list; without a total it only moves, since Stripe does not say how long its lists are."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with progress(*columns, TimeElapsedColumn()) as bar:
        tasks: dict[str, TaskID] = {}

        def count(name: str, objects: int) -> None:
            if name not in tasks:
                for earlier in tasks.values():
                    bar.stop_task(earlier)
                tasks[name] = bar.add_task(f"{what} {name}", total=total)
            bar.update(tasks[name], completed=objects)

        yield count


def _for_programs(value: object) -> str:
    return value.isoformat() if isinstance(value, datetime) else str(value)


def _shown(value: object) -> str:
    return f"{value:%Y-%m-%d %H:%M:%S}" if isinstance(value, datetime) else "" if value is None else str(value)
