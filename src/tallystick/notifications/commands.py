"""`tallystick notifications`: see what was told to whom, and tell it again."""

import json
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from tallystick.terminal import Json, err, fail, out, print_table, with_resources

if TYPE_CHECKING:
    from tallystick.resources import Resources

app = typer.Typer(help="Notifications to your own services: what was told to whom.", no_args_is_help=True)


@app.command("list")
def list_(
    dead: Annotated[bool, typer.Option("--dead", help="Only those that were given up.")] = False,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="How many of the newest.")] = 100,
    json_: Json = False,
) -> None:
    """List notifications, the newest first, once for each endpoint."""

    async def work(resources: "Resources") -> list[dict[str, Any]]:
        from tallystick.notifications.history import STATES, list_deliveries

        return await list_deliveries(resources, states=("dead",) if dead else STATES, limit=limit)

    found = with_resources(work)
    if json_:
        out.print_json(json.dumps(found, default=_instant))
        return
    if not found:
        out.print("There are none.")
        return
    table = Table(
        "id", "type", "customer", "endpoint", "state", "tries", "last try", "made", "next", box=None, pad_edge=False
    )
    for row in found:
        table.add_row(
            row["id"],
            row["type"],
            row["customer"],
            row["endpoint"],
            row["state"],
            str(row["attempts"]),
            row["outcome"] or "",
            f"{row['created_at']:%Y-%m-%d %H:%M}",
            f"{row['next_attempt_at']:%Y-%m-%d %H:%M}" if row["next_attempt_at"] else "",
        )
    print_table(table)


@app.command("replay")
def replay(
    ids: Annotated[list[str] | None, typer.Argument(metavar="ID…", help="Notifications to send again.")] = None,
    dead: Annotated[bool, typer.Option("--dead", help="All that were given up.")] = False,
    json_: Json = False,
) -> None:
    """Send dead notifications again, or waiting ones now; a running worker does it within a second.

    A state that is out of date, because the endpoint has been told a newer one, is not sent: it becomes superseded.
    """
    if bool(ids) is dead:
        fail("name the notifications, or give --dead")

    async def work(resources: "Resources") -> list[dict[str, Any]]:
        from tallystick.notifications.history import replay

        return await replay(resources, ids or None, datetime.now(UTC))

    done = with_resources(work)
    unknown = sorted(set(ids or ()) - {row["id"] for row in done})
    if json_:
        out.print_json(json.dumps(done))
    else:
        superseded = sum(row["state"] == "superseded" for row in done)
        out.print(f"To be sent: {len(done) - superseded}. Superseded: {superseded}.")
    if unknown:
        err.print(f"Neither dead nor waiting: {' '.join(unknown)}")
        raise typer.Exit(1)


def _instant(value: object) -> str:
    assert isinstance(value, datetime)
    return value.isoformat()
