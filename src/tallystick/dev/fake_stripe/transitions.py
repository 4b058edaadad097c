"""The clock at work: performs what is due, in the order in which it is due."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

from tallystick.dev.fake_stripe import invoicing, lifecycle, metering, payments
from tallystick.dev.fake_stripe.state import Object

if TYPE_CHECKING:
    from tallystick.dev.fake_stripe.account import Account

logger = logging.getLogger(__name__)

# Each transition: the kind of its object, when it is due on that object (None: not any more), and what it does.
Transition = tuple[str, Callable[["Account", Object], "int | None"], Callable[["Account", Object], "str | None"]]


def _period_end(account: Account, subscription: Object) -> int | None:
    return lifecycle.period_end(account, subscription) if subscription["status"] in lifecycle.LIVE else None


def _cancel_at(_: Account, subscription: Object) -> int | None:
    cancel_at: int | None = subscription["cancel_at"]
    return cancel_at if subscription["status"] in lifecycle.LIVE else None


def _trial_notice(_: Account, subscription: Object) -> int | None:
    return subscription["_trial_notice_at"] if subscription["status"] == "trialing" else None


def _incomplete(_: Account, subscription: Object) -> int | None:
    expires: int = subscription["created"] + lifecycle.INCOMPLETE_SECONDS
    return expires if subscription["status"] == "incomplete" else None


def _resumes_at(_: Account, subscription: Object) -> int | None:
    pause = subscription["pause_collection"]
    return pause["resumes_at"] if pause else None


def _finalizes_at(_: Account, invoice: Object) -> int | None:
    return invoice["automatically_finalizes_at"] if invoice["status"] == "draft" else None


def _next_attempt(_: Account, invoice: Object) -> int | None:
    return invoice["next_payment_attempt"] if invoice["status"] == "open" else None


def _due_date(_: Account, invoice: Object) -> int | None:
    return invoice["due_date"] if invoice["status"] == "open" else None


def _report_due(_: Account, report: Object) -> int | None:
    due: int = report["due"]
    return due


TRANSITIONS: dict[str, Transition] = {
    "subscription.period_end": ("subscription", _period_end, lifecycle.cycle),
    "subscription.cancel": ("subscription", _cancel_at, lifecycle.cancel_when_due),
    "subscription.invoice_upcoming": ("subscription", lifecycle.upcoming_notice_at, lifecycle.tell_of_upcoming_invoice),
    "subscription.trial_will_end": ("subscription", _trial_notice, lifecycle.trial_will_end),
    "subscription.incomplete_expires": ("subscription", _incomplete, lifecycle.expire_incomplete),
    "subscription.resume_collection": ("subscription", _resumes_at, lifecycle.resume_collection),
    "invoice.finalize": ("invoice", _finalizes_at, invoicing.finalize_when_due),
    "invoice.retry": ("invoice", _next_attempt, payments.retry),
    "invoice.overdue": ("invoice", _due_date, invoicing.overdue),
    "meter.report_errors": ("_meter_errors", _report_due, metering.report_errors),
}


def plan_all(account: Account) -> None:
    """Fills the agenda from the objects, after a restart."""
    account.agenda.clear()
    for subscription in account.state.all("subscription"):
        lifecycle.plan(account, subscription)
    for invoice in account.state.all("invoice"):
        invoicing.plan(account, invoice)
    for report in account.state.all("_meter_errors"):
        account.agenda.plan(report["due"], "meter.report_errors", report["id"])


class ClockWork:
    """Performs transitions, for a clock that is moved and for one that runs. Only one of the two acts at a time."""

    def __init__(self, account: Account) -> None:
        self._account = account
        self._turn = asyncio.Lock()

    async def move(self, target: int, settle_seconds: float) -> list[Object]:
        """Moves the clock forward, performing all that is due on the way. Returns what happened, in order.

        Before a finalization that still waits for its `invoice.created` to be answered, it waits for that answer, up
        to `settle_seconds` real seconds.
        """
        async with self._turn:
            account = self._account
            usual, account.settle_seconds = account.settle_seconds, settle_seconds
            try:
                performed = await self._perform_until(target, settle_seconds)
                account.clock.move_to(max(target, account.now()))
            finally:
                account.settle_seconds = usual
            account.note()
            return performed

    async def run(self) -> None:
        """Performs what falls due as the clock runs, until cancelled."""
        account = self._account
        while True:
            account.agenda.changed.clear()
            due, now = account.agenda.next_due(), account.now()
            if due is not None and due <= now:
                async with self._turn:
                    try:
                        await self._perform_until(account.now(), settle_seconds=0)
                    except Exception:
                        # The transition that failed is off the agenda: the clock goes on with the next.
                        logger.exception("a transition of the fake Stripe's clock failed")
                continue
            # A frozen clock or an empty agenda waits for a change. A running clock is looked at again each minute at
            # the latest, since it may be moved or the machine may sleep.
            pause = None if due is None or account.clock.frozen_at is not None else min(due - now, 60)
            with suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await account.agenda.changed.wait()

    async def _perform_until(self, target: int, settle_seconds: float) -> list[Object]:
        account = self._account
        performed: list[Object] = []
        deadline = time.monotonic() + settle_seconds
        try:
            while (due := account.agenda.next_due()) is not None and due <= target:
                due, name, object_id = account.agenda.pop()
                kind, due_of, perform = TRANSITIONS[name]
                item = account.state.get(kind, object_id)
                account.clock.pinned_at = max(due, account.clock.pinned_at or due)
                if item is None or due_of(account, item) != due:
                    continue
                if name == "invoice.finalize" and item["webhooks_delivered_at"] is None:
                    await account.deliveries.answered(item["_created_event"], max(0, deadline - time.monotonic()))
                    if due_of(account, item) != due:
                        continue
                outcome = perform(account, item)
                if outcome is not None:
                    performed.append({"at": due, "transition": name, "id": object_id, "outcome": outcome})
                # Webhooks and calls have their turn between two transitions.
                await asyncio.sleep(0)
        finally:
            account.clock.pinned_at = None
        return performed
