"""`tallystick access`: decide everybody's access anew."""

import json
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import typer
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

from tallystick.terminal import Json, out, progress, with_resources

if TYPE_CHECKING:
    from tallystick.access.upkeep import Recomputed
    from tallystick.resources import Resources

app = typer.Typer(help="Who may use the product.", no_args_is_help=True)


@app.command("recompute")
def recompute(json_: Json = False) -> None:
    """Decide the access of every customer anew from the mirror and the present rules, in batches.

    A worker does this by itself after a change of the rules file; this does it now, and says how far it is.
    """

    async def work(resources: "Resources") -> "Recomputed":
        from tallystick.access.upkeep import count_customers, recompute_everybody

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with progress(*columns) as bar:
            task = bar.add_task("customers", total=await count_customers(resources))
            return await recompute_everybody(
                resources, datetime.now(UTC), lambda done: bar.update(task, completed=done)
            )

    done = with_resources(work)
    if json_:
        out.print_json(json.dumps({"customers": done.customers, "changed": done.changed}))
    else:
        out.print(f"Decided {done.customers} customers anew; {done.changed} changed.")
