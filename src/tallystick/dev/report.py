"""What the demo's month came to, customer by customer: both halves of the tally laid together."""

from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from itertools import groupby

from rich.console import Console
from rich.table import Table

from tallystick.usage.events import plain

UNKNOWN = datetime.min.replace(tzinfo=UTC)


@dataclass
class Customer:
    """One customer of the demo: what it is called, its period, and what the API has accepted for it."""

    ref: str
    declined: bool
    id: str = ""
    subscription: str = ""
    period_start: datetime = UNKNOWN
    period_end: datetime = UNKNOWN
    accepted: Decimal = Decimal(0)
    counted: Decimal = Decimal(0)
    invoiced: Decimal | None = None
    access: list[str] = field(default_factory=list)

    @property
    def expected_access(self) -> list[str]:
        """Before the payment, after its first try, at the end."""
        return ["active", "restricted" if self.declined else "active", "active"]

    @property
    def good(self) -> bool:
        return self.accepted == self.counted == self.invoiced and self.access == self.expected_access


@dataclass
class Report:
    """What the month came to."""

    customers: list[Customer]
    posted: int
    repeats: int
    webhooks: int
    webhook_repeats: int
    conserved: bool

    @property
    def good(self) -> bool:
        return self.conserved and all(customer.good for customer in self.customers)

    def as_json(self) -> dict[str, object]:
        return {
            "good": self.good,
            "posted": self.posted,
            "repeats": self.repeats,
            "webhooks": self.webhooks,
            "webhook_repeats": self.webhook_repeats,
            "conserved": self.conserved,
            "customers": [
                {
                    "customer": customer.ref,
                    "accepted": plain(customer.accepted),
                    "ledger": plain(customer.counted),
                    "invoiced": None if customer.invoiced is None else plain(customer.invoiced),
                    "access": customer.access,
                    "good": customer.good,
                }
                for customer in self.customers
            ],
        }

    def print(self, console: Console) -> None:
        table = Table("customer", "accepted", "invoiced", "equal", "access", box=None, pad_edge=False)
        for column in table.columns:
            column.no_wrap = True
        for column in table.columns[1:3]:
            column.justify = "right"
        for customer in self.customers:
            table.add_row(
                customer.ref,
                plain(customer.accepted),
                "none" if customer.invoiced is None else plain(customer.invoiced),
                "yes" if customer.accepted == customer.counted == customer.invoiced else "[bold red]no[/]",
                " → ".join(access for access, _ in groupby(customer.access))
                + ("" if customer.access == customer.expected_access else " [bold red]wrong[/]"),
            )
        console.print(table)
        console.print(
            f"\n{self.posted} usage events were posted, {self.repeats} of them repeats; {self.webhooks} webhooks came,"
            f" out of order, {self.webhook_repeats} of them repeats; PostgreSQL was restarted once."
        )
        console.print(
            "Every invoice equals what was accepted, and every access is right."
            if self.good
            else "[bold red]Something is not as it should be.[/]"
        )
