"""`tallystick reconcile` and `tallystick periods`: the proof, and what is urgent."""

import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from tallystick.terminal import Json, err, explain_failure, fail, out, print_table, progress, with_resources

if TYPE_CHECKING:
    from tallystick.resources import Resources
    from tallystick.usage.board import OpenPeriod
    from tallystick.usage.conservation import Conservation, MeterConservation

app = typer.Typer()

SHOWN_STATES = ("accepted", "open", "pending", "sending", "sent", "confirmed", "parked", "voided", "difference")
ALWAYS_SHOWN = ("accepted", "confirmed", "difference")


@dataclass(frozen=True)
class Report:
    """What was found: each customer and meter, the whole ledger (when no slice was asked for), the open drifts.

    `unknown`: the name of a customer or meter that was asked for and is nobody's.
    """

    parts: "Sequence[MeterConservation]"
    whole: "Conservation | None"
    drifts: Sequence[Mapping[str, Any]]
    compared: int | None
    not_asked: Sequence[str]
    unknown: str | None = None

    @property
    def differs(self) -> bool:
        counted = [part.counted for part in self.parts] + ([self.whole] if self.whole else [])
        return not all(each.holds for each in counted) or bool(self.drifts)

    @property
    def good(self) -> bool:
        return not self.differs and not self.not_asked

    def as_json(self) -> dict[str, Any]:
        return {
            "good": self.good,
            "parts": [
                {"customer": part.customer, "meter": part.meter, "additive": part.additive, **part.counted.as_json()}
                for part in self.parts
            ],
            "whole_ledger": self.whole.as_json() if self.whole else None,
            "compared_with_stripe": self.compared,
            "not_compared": list(self.not_asked),
            "drifts": [
                {name: str(value) if name in ("ours", "stripes") else _time(value) for name, value in drift.items()}
                for drift in self.drifts
            ],
        }


@app.command()
def reconcile(
    customer: Annotated[str | None, typer.Option(help="A reference or a cus_… id; else all.")] = None,
    meter: Annotated[str | None, typer.Option(help="A meter's event name; else all.")] = None,
    from_: Annotated[str | None, typer.Option("--from", metavar="TIME", help="As in 2026-01-31T00:00Z.")] = None,
    to: Annotated[str | None, typer.Option(metavar="TIME", help="Excluded.")] = None,
    stripe: Annotated[bool, typer.Option("--stripe", help="Ask Stripe for its summaries now.")] = False,
    json_: Json = False,
) -> None:
    """Prove that every accepted event is accounted for, and that Stripe says the same.

    By customer and meter: what was accepted, and how much of it is open, sent, confirmed by Stripe's summaries, parked
    or voided. Exit code 1 if a number is missing, or if Stripe's differs.
    """
    start, end = _read_time(from_, "--from"), _read_time(to, "--to")
    if start is not None and end is not None and not start < end:
        fail("--to must lie after --from")

    async def work(resources: "Resources") -> Report:
        from tallystick import db
        from tallystick.usage.conservation import (
            WHOLE_LEDGER_TIMEOUT,
            Slice,
            count_conservation,
            count_slices,
            find_first_day,
        )
        from tallystick.usage.drain import drain
        from tallystick.usage.query import find_refs, find_unknown
        from tallystick.usage.reconciliation import find_drifts

        await drain(resources, datetime.now(UTC))
        async with db.transaction(resources.engine) as connection:
            known, refs = await find_refs(connection, customer) if customer is not None else (None, None)
        wanted = {"customer": known or customer, "meter": meter, "from": start, "to": end}
        compared, not_asked = await _ask_stripe(resources, wanted) if stripe else (None, [])
        whole = None
        with err.status("adding up the ledger"):
            async with db.transaction(resources.engine) as connection:
                first = await find_first_day(connection)
                begin = max((at for at in (start, first) if at is not None), default=None)
                parts = await count_slices(connection, Slice(refs, meter, begin, end), WHOLE_LEDGER_TIMEOUT)
                if all(given is None for given in (customer, meter, start, end)):
                    whole = await count_conservation(connection)
                drifts = await find_drifts(connection, wanted)
                rules = resources.rules.current(datetime.now(UTC))
                unknown = None if parts else await find_unknown(connection, customer, meter, rules)
        name = {"customer": customer, "meter": meter}[unknown] if unknown is not None else None
        return Report(parts, whole, drifts, compared, not_asked, name)

    report = with_resources(work)
    if report.unknown is not None:
        fail(f"there is no usage of {report.unknown!a}")
    if json_:
        out.print_json(json.dumps(report.as_json()))
    else:
        _print(report)
    sys.exit(0 if report.good else 1)


@app.command()
def periods(json_: Json = False) -> None:
    """The draft invoices: how long they are drafts at least, and which usage Stripe was not told yet."""

    async def work(resources: "Resources") -> "list[OpenPeriod]":
        from tallystick.usage.board import list_open_periods

        return await list_open_periods(resources, datetime.now(UTC))

    found = with_resources(work)
    if json_:
        out.print_json(json.dumps([period.as_json() for period in found]))
        return
    if not found:
        out.print("There is no draft invoice.")
        return
    table = Table(
        "left, at least", "customer", "invoice", "period end", "meter", "not sent", "Stripe", box=None, pad_edge=False
    )
    for period in found:
        left = f"{period.as_json()['minutes_left']} min"
        for usage in period.meters:
            unsent = [
                f"{usage.events[state]} {state}"
                for state in ("open", "pending", "sending", "parked")
                if usage.events.get(state)
            ]
            checked = f"{usage.checked_at:%H:%M} UTC" if usage.checked_at else "never"
            table.add_row(
                left,
                period.customer,
                period.invoice,
                f"{period.period_end:%Y-%m-%d %H:%M:%S}",
                usage.meter,
                ", ".join(unsent) or "nothing",
                "confirmed" if usage.confirmed else f"not confirmed; checked {checked}",
            )
    print_table(table)


async def _ask_stripe(resources: "Resources", wanted: Mapping[str, Any]) -> tuple[int, list[str]]:
    """Compare everything in the slice with Stripe, with a progress bar; how many, and which could not be asked."""
    from tallystick import db
    from tallystick.stripe_gateway import STRIPE_ERRORS
    from tallystick.usage.reconciliation import compare_now, find_pairs

    async with db.transaction(resources.engine) as connection:
        pairs = await find_pairs(connection, wanted)
    not_asked = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with progress(*columns) as bar:
        task = bar.add_task("asking Stripe", total=len(pairs))
        for pair in pairs:
            try:
                compared = await compare_now(resources, pair, datetime.now(UTC))
                problem = None if compared else "Stripe has no such meter"
            except STRIPE_ERRORS as error:
                if error.http_status:
                    problem = f"Stripe answered {error.http_status}: {str(error).partition(chr(10))[0]}"
                else:
                    problem = explain_failure(error)
            if problem:
                not_asked.append(f"{pair.customer} {pair.event_name}: {problem}")
            bar.advance(task)
    return len(pairs) - len(not_asked), not_asked


def _print(report: Report) -> None:
    drifts = Counter((drift["customer"], drift["meter"]) for drift in report.drifts)
    rows = []
    for part in report.parts:
        kind = "quantity" if part.additive else "events"
        numbers = part.counted.as_json()[kind]
        rows.append((part.customer, part.meter, kind, numbers, drifts[part.customer, part.meter]))
    if report.whole:
        rows += [("all", "all", kind, numbers, len(drifts)) for kind, numbers in report.whole.as_json().items()]
    # A state in which nothing is takes no room.
    shown = [name for name in SHOWN_STATES if name in ALWAYS_SHOWN or any(Decimal(row[3][name]) for row in rows)]
    table = Table("customer", "meter", "in", *shown, "drifts", box=None, pad_edge=False)
    for column in table.columns[3:]:
        column.justify = "right"
    for customer, meter, kind, numbers, drifting in rows:
        table.add_row(customer, meter, kind, *(str(numbers[name]) for name in shown), str(drifting))
    print_table(table)
    for drift in report.drifts:
        out.print(
            f"drift: {drift['customer']} {drift['meter']} {drift['hour']:%Y-%m-%d %H:00} UTC: sent {drift['ours']},"
            f" Stripe says {drift['stripes']}, since {drift['first_seen_at']:%Y-%m-%d %H:%M}",
            markup=False,
        )
    if report.compared is not None:
        out.print(f"Compared {report.compared} customers' meters with Stripe now.")
    for problem in report.not_asked:
        err.print(f"not compared: {problem}", markup=False)
    if report.differs:
        out.print("Something differs: see above.")
    else:
        out.print("Everything is accounted for." if report.good else "Not everything could be compared: see above.")


def _read_time(given: str | None, option: str) -> datetime | None:
    if given is None:
        return None
    try:
        at = datetime.fromisoformat(given.upper())
    except ValueError:
        fail(f"{option} is no time; write it as 2026-01-31T00:00Z")
    return at.replace(tzinfo=UTC) if at.tzinfo is None else at.astimezone(UTC)


def _time(value: Any) -> Any:
    return value.isoformat() if isinstance(value, datetime) else value
