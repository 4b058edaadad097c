"""Marks: which of two events about one object has the last word.

Stripe promises no order of delivery, and `created` has whole seconds. Every mirrored row carries the mark of the event
that wrote it, and an event writes only over a smaller mark. Marks are totally ordered, so any order of arrival ends in
the same row:

    1. deleted    nothing revives a deleted object
    2. final      nor does Stripe ever move an object out of a final status (canceled, incomplete_expired, paid, void)
    3. created    the later second
    4. rank       in one second: an update is later than the object's creation
    5. event      in one second and rank: the greater id, which is arbitrary but the same for everybody

Where only 5 decides, the row is written and `needs_refresh` set: the object itself, fetched from Stripe, settles it. A
deleted or final object needs no second look.

The same order is written twice, for Python (events that wait together) and for PostgreSQL (against the row); a
test compares the two.
"""

from datetime import UTC, datetime

import msgspec

CREATED, UPDATED, FINAL = 0, 1, 2

# The created time of marks that every event beats; PostgreSQL writes it -infinity.
NEVER = datetime.min.replace(tzinfo=UTC)


class Mark(msgspec.Struct, frozen=True):
    """Which event says so, and when it was created. The mark of a stub, known only from links to it, is `STUB`."""

    deleted: bool
    created: datetime
    rank: int
    event: str

    @property
    def order(self) -> tuple[bool, bool, datetime, int, str]:
        """What marks are compared by; the greatest wins."""
        return (self.deleted, self.rank == FINAL, self.created, self.rank, self.event)

    def ties_with(self, other: "Mark") -> bool:
        """Whether only the ids of two different events tell which of them wins."""
        return (
            self.order[:4] == other.order[:4] and self.event != other.event and not self.deleted and self.rank != FINAL
        )


STUB = Mark(deleted=False, created=NEVER, rank=CREATED, event="")


def _order(row: str) -> str:
    # A database's own collation may sort ids otherwise than Python does; "C" is the order of the bytes, as in Python.
    return (
        f'({row}.deleted, {row}.mark_rank = {FINAL}, {row}.mark_created, {row}.mark_rank, {row}.mark_event COLLATE "C")'
    )


def wins_over(new: str, old: str) -> str:
    """SQL: whether the row `new` has a greater mark than the row `old` (see `Mark.order`)."""
    return f"{_order(new)} > {_order(old)}"


def ties_with(new: str, old: str) -> str:
    """SQL: whether only the events' ids tell which of two rows wins (see `Mark.ties_with`)."""
    return (
        f"({new}.mark_created = {old}.mark_created AND {new}.mark_rank = {old}.mark_rank"
        f" AND {new}.mark_event <> {old}.mark_event AND {old}.mark_rank <> {FINAL}"
        f" AND NOT {new}.deleted AND NOT {old}.deleted)"
    )
