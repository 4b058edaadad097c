"""The policy is the tables of docs/access.md: the document is read, and each line tried under every rule it names."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import permutations, product
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tallystick.access.policy import (
    ACCESSES,
    END_OF_TIME,
    REASONS,
    Decision,
    Invoice,
    Subscription,
    decide_access,
    fingerprint,
)
from tallystick.rules import Access, AccessRules

DOCUMENT = (Path(__file__).parents[2] / "docs" / "access.md").read_text()
THEN = datetime(2026, 1, 1, tzinfo=UTC)
DAY = timedelta(days=1)
DEFAULTS = AccessRules()
GRACE_DAYS = 3

PAUSED_COLLECTION = "active, collection paused"
SUBSCRIPTIONS = (
    "active",
    PAUSED_COLLECTION,
    "trialing",
    "past_due",
    "unpaid",
    "paused",
    "incomplete",
    "incomplete_expired",
    "canceled",
    "any other",
)
FAILED = ("none", "open", "paid", "uncollectible", "void")  # a draft has not been tried, so it cannot have failed
LATEST = ("unknown", "draft", "open", "paid", "uncollectible", "void")
RULES = ("trialing", "past_due", "unpaid", "paused", "incomplete")

Case = tuple[str, str, str]


def read_rows(header: str) -> list[list[str]]:
    """The cells of the table of the document that begins with this header."""
    lines = DOCUMENT.split(header)[1].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


@dataclass(frozen=True)
class Expected:
    """What a line of the table says. `access`: an access, a rule, or two rules of which the worse counts."""

    access: str
    reason: str
    grace: bool

    @property
    def rules(self) -> list[str]:
        return re.findall(r"`(\w+)`", self.access)

    def under(self, rules: AccessRules, *, in_grace: bool) -> str:
        given: list[str] = [getattr(rules, rule) for rule in self.rules] or [self.access]
        if self.grace:
            # Where two rules are named, the first is the trial's own, which no payment changes.
            given[-1] = GRACE[given[-1]][0 if in_grace else 1]
        return max(given, key=ACCESSES.index)


def read_table() -> Iterator[tuple[Case, Expected]]:
    """Every combination that a line of the table stands for."""
    for subscription, failed, latest, access, reason, grace in read_rows("| subscription | failed invoice |"):
        subscriptions = subscription.split("; ")
        failures = list(FAILED) if failed == "any" else failed.split(", ")
        latests = list(LATEST) if latest == "any" else latest.split(", ")
        for case in product(subscriptions, failures, latests):
            yield case, Expected(access, reason, grace == "yes")


TABLE = list(read_table())
GRACE = {gives: (during, after) for gives, during, after in read_rows("| the rule gives |")}


def test_the_table_has_every_combination_once() -> None:
    assert sorted(case for case, _ in TABLE) == sorted(product(SUBSCRIPTIONS, FAILED, LATEST))
    assert set(GRACE) == set(ACCESSES) == set(get_args(Access))


def test_the_rules_and_their_defaults_are_the_documented_ones() -> None:
    documented = {rule.strip("`"): default.strip("`") for rule, default, _ in read_rows("| rule | default |")}

    assert documented == {rule: getattr(DEFAULTS, rule) for rule in RULES}
    assert set(RULES) | {"grace_days", "one_off_invoices"} == set(AccessRules.model_fields)


def arrange(case: Case, number: int = 1, failed_at: datetime = THEN) -> tuple[Subscription, list[Invoice]]:
    """A subscription as the line says, and its invoices."""
    status, failed, latest = case
    subscription = Subscription(
        f"sub_{number}",
        {PAUSED_COLLECTION: "active", "any other": "suspended"}.get(status, status),
        pause_collection="void" if status == PAUSED_COLLECTION else None,
        latest_invoice=f"in_latest_{number}",
        prices=(f"price_{number}",),
        current_period_start=failed_at,
    )
    invoices = []
    if failed != "none":
        invoices.append(Invoice(f"in_failed_{number}", subscription.id, failed, failed_at - DAY, failed_at))
    if latest != "unknown":
        invoices.append(
            Invoice(f"in_latest_{number}", subscription.id, latest, failed_at + DAY, None, finalized_at=failed_at)
        )
    return subscription, invoices


@pytest.mark.parametrize(("case", "expected"), TABLE, ids=[" / ".join(case) for case, _ in TABLE])
def test_a_line_of_the_table_under_every_rule_that_it_names(case: Case, expected: Expected) -> None:
    subscription, invoices = arrange(case)
    end = THEN + GRACE_DAYS * DAY
    moments = ((0, THEN), (GRACE_DAYS, end - timedelta(microseconds=1)), (GRACE_DAYS, end))
    for values, (grace_days, now) in product(product(ACCESSES, repeat=len(expected.rules)), moments):
        rules = AccessRules(grace_days=grace_days, **dict(zip(expected.rules, values, strict=True)))  # type: ignore[arg-type]

        decision = decide_access([subscription], invoices, rules, now)

        in_grace = grace_days > 0 and now < end
        said = (decision.access, decision.reason)
        assert said == (expected.under(rules, in_grace=in_grace), expected.reason), (rules, now)
        assert decision.prices == (("price_1",) if decision.access in ("active", "grace") else ())
        began_here = decision.access == "grace" != expected.under(rules, in_grace=False)
        assert (decision.until == end) is began_here, (rules, now, decision)


def test_every_reason_is_documented() -> None:
    assert [reason for reason in REASONS if f"| {reason} |" not in DOCUMENT] == []


def test_the_failed_invoice_may_be_the_latest_one() -> None:
    subscription = Subscription("sub_1", "past_due", latest_invoice="in_1")
    failed = Invoice("in_1", "sub_1", "open", THEN, THEN)
    paid = Invoice("in_1", "sub_1", "paid", THEN, THEN)

    assert decide_access([subscription], [failed], DEFAULTS, THEN).access == "restricted"
    assert decide_access([subscription], [paid], DEFAULTS, THEN) == Decision("active", "payment_received")


def test_an_earlier_paid_invoice_does_not_lift_an_uncollectible_one() -> None:
    subscription = Subscription("sub_1", "active", latest_invoice="in_1")
    earlier = Invoice("in_1", "sub_1", "paid", THEN - timedelta(days=30), None)
    given_up = Invoice("in_2", "sub_1", "uncollectible", THEN, THEN)

    assert decide_access([subscription], [earlier, given_up], DEFAULTS, THEN).reason == "payment_failed"


@pytest.mark.parametrize(
    ("since", "dates"),
    [
        ("overdue", {"due_date": THEN, "finalized_at": THEN - DAY, "created": THEN - 2 * DAY}),
        ("finalized", {"finalized_at": THEN, "created": THEN - DAY}),
        ("finalized, not due yet", {"due_date": THEN + 30 * DAY, "finalized_at": THEN, "created": THEN - DAY}),
        ("created", {"created": THEN}),
    ],
)
def test_grace_without_a_failed_payment_runs_from_what_the_invoice_says(since: str, dates: dict[str, datetime]) -> None:
    subscription = Subscription("sub_1", "past_due", latest_invoice="in_1", current_period_start=THEN - 9 * DAY)
    sent = Invoice("in_1", "sub_1", "open", dates["created"], None, dates.get("due_date"), dates.get("finalized_at"))

    decision = decide_access([subscription], [sent], AccessRules(grace_days=5), THEN + DAY)

    assert (decision.access, decision.reason, decision.until) == ("grace", "past_due", THEN + 5 * DAY), since


def test_grace_without_any_invoice_runs_from_the_period_and_without_that_not_at_all() -> None:
    known = Subscription("sub_1", "past_due", current_period_start=THEN)

    assert decide_access([known], [], AccessRules(grace_days=5), THEN + DAY).until == THEN + 5 * DAY
    unknown = Subscription("sub_1", "past_due")
    assert decide_access([unknown], [], AccessRules(grace_days=5), THEN) == Decision("restricted", "past_due")


def test_grace_runs_from_the_oldest_unpaid_invoice() -> None:
    subscription = Subscription("sub_1", "past_due")
    older = Invoice("in_1", "sub_1", "open", THEN, THEN)
    newer = Invoice("in_2", "sub_1", "open", THEN + DAY, THEN + DAY)
    rules = AccessRules(grace_days=5)

    assert decide_access([subscription], [newer, older], rules, THEN + DAY).until == THEN + 5 * DAY
    paid = Invoice("in_1", "sub_1", "paid", THEN, THEN)
    assert decide_access([subscription], [newer, paid], rules, THEN + DAY).until == THEN + 6 * DAY


@pytest.mark.parametrize("before", [timedelta(0), timedelta(days=4), timedelta(days=5), timedelta(days=6)])
def test_grace_ends_with_time_itself(before: timedelta) -> None:
    since = END_OF_TIME - before
    known = Subscription("sub_1", "past_due", latest_invoice="in_1")
    invoice = Invoice("in_1", "sub_1", "open", since, None)

    decision = decide_access([known], [invoice], AccessRules(grace_days=5), THEN)

    assert (decision.access, decision.until) == ("grace", END_OF_TIME - max(before - 5 * DAY, timedelta(0)))


def test_of_several_graces_the_last_is_shown_and_the_first_is_watched() -> None:
    rules = AccessRules(grace_days=5)
    cases = [arrange(("past_due", "open", "unknown"), number, THEN + number * DAY) for number in (1, 2)]
    subscriptions, invoices = [case[0] for case in cases], [case[1][0] for case in cases]

    both = decide_access(subscriptions, invoices, rules, THEN + 3 * DAY)
    assert (both.until, both.decide_again_at) == (THEN + 7 * DAY, THEN + 6 * DAY)
    assert both.prices == ("price_1", "price_2")

    one = decide_access(subscriptions, invoices, rules, THEN + 6 * DAY)
    assert (one.access, one.until, one.decide_again_at) == ("grace", THEN + 7 * DAY, THEN + 7 * DAY)
    assert one.prices == ("price_2",)

    active = Subscription("sub_3", "active", prices=("price_3",))
    beside = decide_access([active, *subscriptions], invoices, rules, THEN + 3 * DAY)
    assert (beside.access, beside.until, beside.decide_again_at) == ("active", None, THEN + 6 * DAY)
    assert beside.prices == ("price_1", "price_2", "price_3")


def test_a_grace_that_a_rule_gives_without_end_outlasts_the_others() -> None:
    rules = AccessRules(grace_days=5, paused="grace")
    failing, invoices = arrange(("past_due", "open", "unknown"))

    decision = decide_access([failing, Subscription("sub_2", "paused")], invoices, rules, THEN)

    assert (decision.access, decision.until, decision.decide_again_at) == ("grace", None, THEN + 5 * DAY)


@pytest.mark.parametrize("status", ["draft", *FAILED[1:]])
def test_a_failed_one_off_invoice_restricts_by_setting(status: str) -> None:
    documented = {
        one: (access, reason)
        for failed, access, reason, _ in read_rows("| failed invoice without a subscription |")
        for one in failed.split(", ")
    }
    active = Subscription("sub_1", "active", prices=("price_1",))
    one_off = Invoice("in_1", None, status, THEN, THEN)
    ignored = Decision("active", "subscription_active", ("price_1",))

    assert decide_access([active], [one_off], DEFAULTS, THEN) == ignored
    access, reason = documented.get(status, ("active", ""))
    strict = AccessRules(one_off_invoices="restrict")
    decision = decide_access([active], [one_off], strict, THEN)
    assert decision == (Decision("restricted", reason) if access == "restricted" else ignored)
    not_failed = Invoice("in_1", None, status, THEN, None)
    assert decide_access([active], [not_failed], strict, THEN) == ignored


def test_a_failed_one_off_invoice_has_days_of_grace_too() -> None:
    rules = AccessRules(one_off_invoices="restrict", grace_days=5)
    active = Subscription("sub_1", "active", prices=("price_1",))
    one_off = Invoice("in_1", None, "open", THEN, THEN)
    end = THEN + 5 * DAY

    decision = decide_access([active], [one_off], rules, THEN)
    assert decision == Decision("grace", "one_off_payment_failed", ("price_1",), end, end)
    assert decide_access([active], [one_off], rules, end) == Decision("restricted", "one_off_payment_failed")

    failing, invoices = arrange(("past_due", "open", "unknown"), failed_at=THEN + DAY)
    both = decide_access([failing], [*invoices, one_off], rules, THEN + 2 * DAY)
    assert (both.access, both.reason, both.until) == ("grace", "payment_failed", end)


def test_a_one_off_invoice_never_makes_access_better() -> None:
    one_off = Invoice("in_1", None, "open", THEN, THEN)

    for grace_days in (0, 5):
        rules = AccessRules(one_off_invoices="restrict", grace_days=grace_days)
        assert decide_access([Subscription("sub_1", "canceled")], [one_off], rules, THEN).access == "none"
        assert decide_access([], [one_off], rules, THEN) == Decision("none", "no_subscription")


def test_a_deleted_customer_has_no_access_whatever_its_subscriptions_say() -> None:
    decision = decide_access([Subscription("sub_1", "active")], [], DEFAULTS, THEN, customer_deleted=True)

    assert decision == Decision("none", "customer_deleted")


def test_one_failing_subscription_takes_away_only_what_it_grants() -> None:
    good = Subscription("sub_1", "active", prices=("price_b", "price_a"))
    bad = Subscription("sub_2", "past_due", prices=("price_c",))

    decision = decide_access([bad, good], [], DEFAULTS, THEN)

    assert decision == Decision("active", "subscription_active", ("price_a", "price_b"))


@given(st.lists(st.sampled_from(TABLE), min_size=1, max_size=4), st.sampled_from((0, GRACE_DAYS)))
def test_several_subscriptions_give_the_best_of_each_in_any_order(
    chosen: list[tuple[Case, Expected]], grace_days: int
) -> None:
    arranged = [arrange(case, number) for number, (case, _) in enumerate(chosen)]
    subscriptions = [subscription for subscription, _ in arranged]
    invoices = [invoice for _, of_one in arranged for invoice in of_one]
    rules = AccessRules(grace_days=grace_days)
    given = [(expected.under(rules, in_grace=grace_days > 0), expected.reason) for _, expected in chosen]

    decision = decide_access(subscriptions, invoices, rules, THEN)

    assert decision.access == min((access for access, _ in given), key=ACCESSES.index)
    assert (decision.access, decision.reason) in given
    assert set(decision.prices) == {
        f"price_{number}" for number, (access, _) in enumerate(given) if access in ("active", "grace")
    }
    assert decision == decide_access(reversed(subscriptions), reversed(invoices), rules, THEN)


class CountedId(str):
    """An id that counts how often it is compared."""

    __slots__ = ()
    comparisons = 0
    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        CountedId.comparisons += 1
        return str.__eq__(self, other)


def test_no_subscription_looks_through_all_invoices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CountedId, "comparisons", 0)
    many = 200
    subscriptions = [
        Subscription(CountedId(f"sub_{n}"), "past_due", latest_invoice=CountedId(f"in_{n}")) for n in range(many)
    ]
    invoices = [Invoice(CountedId(f"in_{n}"), CountedId(f"sub_{n}"), "open", THEN, THEN) for n in range(many)]

    decision = decide_access(subscriptions, invoices, DEFAULTS, THEN)

    assert decision == Decision("restricted", "payment_failed")
    assert CountedId.comparisons < 10 * many


def test_other_rules_have_another_fingerprint() -> None:
    several = [AccessRules(), AccessRules(grace_days=1), AccessRules(past_due="none"), AccessRules(unpaid="none")]

    assert fingerprint(AccessRules()) == fingerprint(AccessRules(grace_days=0))
    assert all(fingerprint(one) != fingerprint(other) for one, other in permutations(several, 2))
