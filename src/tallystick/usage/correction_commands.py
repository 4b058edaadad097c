"""`tallystick corrections`: what an operator decides, because nothing can be changed at Stripe any more."""

import json
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.table import Table

from tallystick.terminal import Json, fail, out, print_table, with_resources

if TYPE_CHECKING:
    from tallystick.resources import Resources

app = typer.Typer(help="Usage that was taken back or changed.", no_args_is_help=True)

LIST = """
    SELECT c.*, e.customer_ref, e.meter, e.timestamp
      FROM usage_corrections c
      LEFT JOIN usage_events e ON e.source = c.source AND e.id = c.event_id AND e.day = c.event_day
     WHERE :all OR c.state IN ('pending', 'proposed')
     ORDER BY c.requested_at, c.id
"""

FIND_PROPOSED = """
    SELECT source FROM usage_corrections
     WHERE id = :id AND state = 'proposed' AND (CAST(:source AS text) IS NULL OR source = :source)
     ORDER BY source FOR UPDATE
"""

DECIDE = """
    UPDATE usage_corrections SET state = :state, note = :note, settled_at = :now WHERE source = :source AND id = :id
"""

SHOWN = ("id", "source", "customer", "meter", "timestamp", "delta", "state", "why", "invoice", "reason")

CorrectionId = Annotated[str, typer.Argument(metavar="ID", help="As `tallystick corrections list` shows it.")]
Note = Annotated[str, typer.Option(help="What was done, or why not; kept with the correction.")]
Source = Annotated[str | None, typer.Option(help="Needed only if several sources used this id.")]


@app.command("list")
def list_(
    all_: Annotated[bool, typer.Option("--all", help="Also those that are done.")] = False, json_: Json = False
) -> None:
    """List the corrections that wait: for an operator (`proposed`) or for Stripe (`pending`), the oldest first."""

    async def work(resources: "Resources") -> list[dict[str, Any]]:
        from sqlalchemy import text

        from tallystick import db
        from tallystick.usage.correction_routes import show_correction

        async with db.transaction(resources.engine) as connection:
            rows = (await connection.execute(text(LIST), {"all": all_})).all()
        return [
            show_correction(row).model_dump(mode="json")
            | {
                "customer": row.customer_ref,
                "meter": row.meter,
                "timestamp": row.timestamp and row.timestamp.astimezone(UTC).isoformat().replace("+00:00", "Z"),
            }
            for row in rows
        ]

    found = with_resources(work)
    if json_:
        out.print_json(json.dumps(found))
        return
    if not found:
        out.print("No correction waits.")
        return
    table = Table(*SHOWN, box=None, pad_edge=False)
    for correction in found:
        table.add_row(*(str(correction[name] or "") for name in SHOWN))
    print_table(table)


@app.command("settle")
def settle(correction: CorrectionId, note: Note, source: Source = None) -> None:
    """Note that a proposed correction was made at Stripe, by a credit for example."""
    _decide(correction, source, "settled", note)


@app.command("refuse")
def refuse(correction: CorrectionId, note: Note, source: Source = None) -> None:
    """Decide that a proposed correction is not made. The event counts what it counted before."""
    _decide(correction, source, "refused", note)


def _decide(id: str, source: str | None, state: Literal["settled", "refused"], note: str) -> None:
    from tallystick.card_numbers import refuse_card_number

    refuse_card_number(note, field="--note")

    async def work(resources: "Resources") -> list[str]:
        from sqlalchemy import text

        from tallystick import db

        async with db.transaction(resources.engine) as connection:
            found = list(await connection.scalars(text(FIND_PROPOSED), {"id": id, "source": source}))
            if len(found) == 1:
                values = {"id": id, "source": found[0], "state": state, "note": note, "now": datetime.now(UTC)}
                await connection.execute(text(DECIDE), values)
        return found

    found = with_resources(work)
    if len(found) > 1:
        fail(f"several sources have a correction {id}: name one with --source: {', '.join(found)}")
    if not found:
        fail(f"there is no proposed correction {id}")
    out.print(f"The correction {id} is {state}.", markup=False)
