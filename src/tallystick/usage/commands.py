"""`tallystick parked`: usage that Stripe will not be told as it is, why, and what to do about it."""

import json
import sys
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from tallystick.terminal import Json, err, fail, out, print_table, with_resources

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

    from tallystick.resources import Resources
    from tallystick.usage.parked import Decision

app = typer.Typer(help="Usage that Stripe will not be told as it is.", no_args_is_help=True)

# Decided in one transaction, and so for as long as its rows are locked.
AT_ONCE = 200

BY = "the command line"

Reason = Annotated[str | None, typer.Option(help="Only with this reason, as in period_closed.")]
Customer = Annotated[str | None, typer.Option(help="Only of this customer: a reference or a cus_… id.")]
Meter = Annotated[str | None, typer.Option(help="Only of this meter.")]
Identifiers = Annotated[list[str] | None, typer.Argument(metavar="ID…", help="As `parked list` shows them.")]


@app.command("list")
def list_(
    reason: Reason = None,
    customer: Customer = None,
    meter: Meter = None,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="How many of the oldest.")] = 100,
    json_: Json = False,
) -> None:
    """List parked deliveries, the oldest first."""

    async def work(resources: "Resources") -> list[dict[str, Any]]:
        return await _find(resources, reason, customer, meter, after=0, limit=limit)

    found = with_resources(work)
    if json_:
        out.print_json(json.dumps(found, default=_instant))
        return
    if not found:
        narrowed = any(given is not None for given in (reason, customer, meter))
        out.print("Nothing of this is parked." if narrowed else "Nothing is parked.")
        return
    table = Table("id", "customer", "meter", "quantity", "of", "reason", box=None, pad_edge=False)
    for row in found:
        at = f"{row['timestamp']:%Y-%m-%d %H:%M}"
        table.add_row(row["identifier"], row["customer"], row["meter"], row["quantity"], at, row["reason"])
    print_table(table)
    if len(found) == limit:
        out.print(f"These are the oldest {limit}; --limit shows more.")


@app.command("explain")
def explain_(
    identifier: Annotated[str, typer.Argument(metavar="ID", help="As `parked list` shows it.")], json_: Json = False
) -> None:
    """Tell what happened to a delivery, what Stripe said in each try, and what can be done."""

    async def work(resources: "Resources") -> dict[str, Any] | None:
        from tallystick import db
        from tallystick.usage.parked import explain

        now = datetime.now(UTC)
        async with db.transaction(resources.engine) as connection:
            return await explain(connection, identifier, resources.rules.current(now), now)

    found = with_resources(work)
    if found is None:
        fail(f"there is no delivery {identifier}")
    if json_:
        out.print_json(json.dumps(found, default=_instant))
        return
    out.print(f"{found['quantity']} of {found['meter']} for {found['customer']}, of {found['timestamp']}", markup=False)
    out.print(f"{found['events']} events; by {found['sender']}; {found['state']}: {found['reason']}", markup=False)
    for each in found["tries"]:
        answer = f"{each['http_status'] or ''} {each['reason'] or ''} {each['request_id'] or ''}"
        out.print(f"  {each['attempt']}. {each['at']:%Y-%m-%d %H:%M:%S}  {each['outcome']}  {answer}", markup=False)
    if not found["tries"]:
        out.print("  It was never tried.")
    if found["happened"]:
        out.print(f"{found['happened']} One can {found['remedy']}.", markup=False)
        out.print(f"Resend: {found['resend_detail'] or 'possible.'}", markup=False)


@app.command("resend")
def resend_(
    ids: Identifiers = None,
    reason: Reason = None,
    customer: Customer = None,
    meter: Meter = None,
    all_: Annotated[bool, typer.Option("--all", help="All that are parked.")] = False,
    carry: Annotated[bool, typer.Option("--carry", help="Move what is too late into the open period.")] = False,
    json_: Json = False,
) -> None:
    """Send parked deliveries again; a running worker does it within a second.

    What Stripe would refuse, or could bill twice, is refused here, with what can be done instead. Exit code 1 then.
    """
    narrowed = any(given is not None for given in (reason, customer, meter))
    if bool(ids) + narrowed + all_ != 1:
        fail("name the deliveries, or give --reason, --customer or --meter, or --all")

    async def decide(resources: "Resources", connection: "AsyncConnection", some: list[str]) -> "list[Decision]":
        from tallystick.usage.parked import resend

        now = datetime.now(UTC)
        rules = resources.rules.current(now)
        return await resend(connection, some, rules, now, by=BY, carried=carry)

    decisions = with_resources(lambda resources: _decide(resources, ids, reason, customer, meter, decide))
    _report(ids, decisions, json_=json_, done="To be sent again")


@app.command("void")
def void_(
    ids: Annotated[list[str], typer.Argument(metavar="ID…", help="As `parked list` shows them.")],
    note: Annotated[str, typer.Option(help="Why; kept with the delivery.")],
    json_: Json = False,
) -> None:
    """Write parked deliveries off: they are never sent, and stay counted as voided."""
    from tallystick.card_numbers import refuse_card_number

    refuse_card_number(note, field="--note")

    async def decide(resources: "Resources", connection: "AsyncConnection", some: list[str]) -> "list[Decision]":
        from tallystick.usage.parked import void

        return await void(connection, some, datetime.now(UTC), by=BY, note=note)

    decisions = with_resources(lambda resources: _decide(resources, ids, None, None, None, decide))
    _report(ids, decisions, json_=json_, done="Voided")


async def _find(
    resources: "Resources", reason: str | None, customer: str | None, meter: str | None, *, after: int, limit: int
) -> list[dict[str, Any]]:
    from tallystick import db
    from tallystick.usage.parked import list_parked
    from tallystick.usage.query import find_refs

    async with db.transaction(resources.engine) as connection:
        known = (await find_refs(connection, customer))[0] if customer is not None else None
        return await list_parked(
            connection, reason=reason, customer=known or customer, meter=meter, after=after, limit=limit
        )


async def _decide(
    resources: "Resources",
    ids: list[str] | None,
    reason: str | None,
    customer: str | None,
    meter: str | None,
    decide: "Callable[[Resources, AsyncConnection, list[str]], Awaitable[list[Decision]]]",
) -> "list[Decision]":
    from tallystick import db

    decisions: list[Decision] = []
    after = 0
    given = list(ids or ())
    while True:
        if ids:
            some, given = given[:AT_ONCE], given[AT_ONCE:]
        else:
            found = await _find(resources, reason, customer, meter, after=after, limit=AT_ONCE)
            some = [row["identifier"] for row in found]
            after = found[-1]["number"] if found else after
        if not some:
            return decisions
        async with db.transaction(resources.engine) as connection:
            decisions += await decide(resources, connection, some)


def _report(ids: list[str] | None, decisions: "list[Decision]", *, json_: bool, done: str) -> None:
    unknown = sorted(set(ids or ()) - {decision.identifier for decision in decisions})
    refused = [decision for decision in decisions if decision.refused]
    if json_:
        out.print_json(json.dumps({"decisions": [each.as_json() for each in decisions], "unknown": unknown}))
    else:
        out.print(f"{done}: {len(decisions) - len(refused)}.")
        for decision in refused:
            err.print(f"{decision.identifier}: {decision.as_json()['detail']}", markup=False)
        for identifier in unknown:
            err.print(f"{identifier}: there is no such delivery", markup=False)
    sys.exit(1 if refused or unknown else 0)


def _instant(value: object) -> str:
    assert isinstance(value, datetime)
    return value.isoformat()
