"""The policy is the table of docs/access.md: the document is read, and each line tried."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tallystick.access.policy import REASONS, Decision, Invoice, Subscription, decide_access

DOCUMENT = Path(__file__).parents[2] / "docs" / "access.md"
THEN = datetime(2026, 1, 1, tzinfo=UTC)

PAUSED_COLLECTION = "active, collection paused"
SUBSCRIPTIONS = (
    "active", PAUSED_COLLECTION, "trialing", "past_due", "unpaid", "paused", "incomplete", "incomplete_expired", "canceled",
    "any other",
)  # fmt: skip
FAILED = ("none", "open", "paid", "uncollectible", "void")  # a draft has not been tried, so it cannot have failed
LATEST = ("unknown", "draft", "open", "paid", "uncollectible", "void")

Case = tuple[str, str, str]


def read_table() -> Iterator[tuple[Case, Decision]]:
    """Every combination that a line of the table stands for."""
    lines = DOCUMENT.read_text().split("| subscription | failed invoice |")[1].split("\n\n")[0].splitlines()[2:]
    for line in lines:
        subscription, failed, latest, access, reason = (cell.strip() for cell in line.strip("|").split("|"))
        subscriptions = subscription.split("; ")
        failures = list(FAILED) if failed == "any" else failed.split(", ")
        latests = list(LATEST) if latest == "any" else latest.split(", ")
        for case in product(subscriptions, failures, latests):
            yield case, Decision(access, reason)  # type: ignore[arg-type]  # an unknown one fails the comparison


TABLE = list(read_table())


def test_the_table_has_every_combination_once() -> None:
    cases = [case for case, _ in TABLE]

    assert sorted(cases) == sorted(product(SUBSCRIPTIONS, FAILED, LATEST))


def arrange(case: Case, number: int) -> tuple[Subscription, list[Invoice]]:
    """A subscription as the line says, and its invoices."""
    status, failed, latest = case
    subscription = Subscription(
        f"sub_{number}",
        {PAUSED_COLLECTION: "active", "any other": "suspended"}.get(status, status),
        pause_collection="void" if status == PAUSED_COLLECTION else None,
        latest_invoice=f"in_latest_{number}",
        prices=(f"price_{number}",),
    )
    invoices = []
    if failed != "none":
        invoices.append(Invoice(f"in_failed_{number}", subscription.id, failed, THEN, THEN))
    if latest != "unknown":
        invoices.append(Invoice(f"in_latest_{number}", subscription.id, latest, THEN + timedelta(days=1), None))
    return subscription, invoices


@pytest.mark.parametrize(("case", "expected"), TABLE, ids=[" / ".join(case) for case, _ in TABLE])
def test_a_line_of_the_table(case: Case, expected: Decision) -> None:
    subscription, invoices = arrange(case, 1)

    decision = decide_access([subscription], invoices)

    assert (decision.access, decision.reason) == (expected.access, expected.reason)
    assert decision.prices == (("price_1",) if decision.access == "active" else ())


def test_every_reason_is_documented() -> None:
    text = DOCUMENT.read_text()

    assert [reason for _, reason in REASONS if f"| {reason} |" not in text] == []


def test_the_failed_invoice_may_be_the_latest_one() -> None:
    subscription = Subscription("sub_1", "past_due", latest_invoice="in_1")
    failed = Invoice("in_1", "sub_1", "open", THEN, THEN)
    paid = Invoice("in_1", "sub_1", "paid", THEN, THEN)

    assert decide_access([subscription], [failed]).access == "restricted"
    assert decide_access([subscription], [paid]) == Decision("active", "payment_received")


def test_an_earlier_paid_invoice_does_not_lift_an_uncollectible_one() -> None:
    subscription = Subscription("sub_1", "active", latest_invoice="in_1")
    earlier = Invoice("in_1", "sub_1", "paid", THEN - timedelta(days=30), None)
    given_up = Invoice("in_2", "sub_1", "uncollectible", THEN, THEN)

    assert decide_access([subscription], [earlier, given_up]).reason == "payment_failed"


def test_a_failed_one_off_invoice_restricts_nothing() -> None:
    one_off = Invoice("in_1", None, "open", THEN, THEN)

    assert decide_access([Subscription("sub_1", "active")], [one_off]).access == "active"


def test_without_a_subscription_there_is_no_access() -> None:
    assert decide_access([], []) == Decision("none", "no_subscription")


def test_a_deleted_customer_has_no_access_whatever_its_subscriptions_say() -> None:
    assert decide_access([Subscription("sub_1", "active")], [], customer_deleted=True).reason == "customer_deleted"


def test_one_failing_subscription_takes_away_only_what_it_grants() -> None:
    good = Subscription("sub_1", "active", prices=("price_b", "price_a"))
    bad = Subscription("sub_2", "past_due", prices=("price_c",))

    assert decide_access([bad, good], []) == Decision("active", "subscription_active", ("price_a", "price_b"))


@given(st.lists(st.sampled_from(TABLE), min_size=1, max_size=4))
def test_several_subscriptions_give_the_best_of_each_in_any_order(chosen: list[tuple[Case, Decision]]) -> None:
    arranged = [arrange(case, number) for number, (case, _) in enumerate(chosen)]
    subscriptions = [subscription for subscription, _ in arranged]
    invoices = [invoice for _, of_one in arranged for invoice in of_one]

    decision = decide_access(subscriptions, invoices)

    assert decision.access == min(
        (expected.access for _, expected in chosen), key=["active", "restricted", "none"].index
    )
    assert (decision.access, decision.reason) in {(expected.access, expected.reason) for _, expected in chosen}
    assert set(decision.prices) == {
        f"price_{number}" for number, (_, expected) in enumerate(chosen) if expected.access == "active"
    }
    assert decision == decide_access(reversed(subscriptions), reversed(invoices))
