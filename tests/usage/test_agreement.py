from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from itertools import combinations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tallystick.usage import agreement
from tallystick.usage.agreement import LAG, MOST_UNKNOWN, Hour, judge

NOW = datetime(2026, 11, 1, tzinfo=UTC)
LONG_AGO = NOW - LAG
JUST_NOW = NOW - timedelta(minutes=5)

Told = tuple[int, Decimal, int, bool, bool]  # id, value, second, known to be taken, taken

# Small whole numbers too, which cancel each other; a 0 is of no account and has a test of its own.
values = st.decimals("-50", 50, places=3).filter(bool) | st.sampled_from([Decimal(1), Decimal(-1), Decimal(2)])
told = st.lists(st.tuples(values, st.integers(0, 20), st.booleans(), st.booleans()), max_size=8).map(
    lambda drawn: [(n, value, at, known, known or taken) for n, (value, at, known, taken) in enumerate(drawn)]
)


def value_of(deliveries: list[Told], formula: str) -> Decimal | None:
    """What Stripe says when it has these."""
    if formula == "last":
        return max(deliveries, key=lambda each: (each[2], each[0]))[1] if deliveries else None
    return sum((value for _, value, *_ in deliveries), Decimal(0)) if formula == "sum" else Decimal(len(deliveries))


def hour_of(deliveries: list[Told], settled_at: datetime) -> Hour:
    known = [each for each in deliveries if each[3]]
    latest = max(known, key=lambda each: (each[2], each[0]), default=None)
    return Hour(
        total=sum((each[1] for each in known), Decimal(0)),
        number=len(known),
        latest=latest and latest[1],
        latest_key=(latest[2], latest[0]) if latest else None,
        sent=tuple(each[0] for each in known),
        takes_back=any(each[1] < 0 for each in known),
        unknown=tuple(each[:3] for each in deliveries if not each[3]),
        settled_at=settled_at,
    )


@given(told, st.sampled_from(["sum", "count", "last"]))
def test_a_judgement_about_what_nobody_knew_is_true(deliveries: list[Told], formula: str) -> None:
    taken = {each[0] for each in deliveries if each[4]}
    theirs = value_of([each for each in deliveries if each[4]], formula)
    judged = judge(hour_of(deliveries, LONG_AGO), theirs, formula, NOW)
    assert set(judged.taken) <= taken
    assert not set(judged.not_taken) & taken
    if all(each[3] for each in deliveries) and (
        formula != "last" or len({each[2] for each in deliveries}) == len(deliveries)
    ):
        assert judged.verdict == "agrees"


ONE = Decimal(1)


@given(told, st.lists(st.booleans(), min_size=8, max_size=8), st.sampled_from(["sum", "count"]))
@example(  # what takes usage back lags, and what is lost would fill the gap
    [(0, ONE, 0, True, True), (1, -ONE, 0, True, True), (2, ONE, 0, False, False)], [True, *[False] * 7], "sum"
)
def test_nothing_is_concluded_from_a_summary_that_lags(deliveries: list[Told], shown: list[bool], formula: str) -> None:
    taken = [each for each in deliveries if each[4]]
    seen = [each for each in taken if shown[each[0]]]
    judged = judge(hour_of(deliveries, JUST_NOW), value_of(seen, formula), formula, NOW)
    assert judged.verdict in ("agrees", "waits")
    assert not judged.not_taken or judged.verdict == "waits"
    if judged.verdict == "agrees":
        assert seen == taken or value_of(seen, formula) == value_of(taken, formula)
        assert set(judged.taken) <= {each[0] for each in taken}


UNKNOWN = tuple((n, Decimal(n), n) for n in range(1, 4))
MANY = tuple((n, Decimal(1), 0) for n in range(MOST_UNKNOWN + 1))


@pytest.mark.parametrize(
    ("hour", "theirs", "verdict"),
    [
        (Hour(total=Decimal(5), settled_at=JUST_NOW), Decimal(5), "agrees"),
        (Hour(total=Decimal(5), settled_at=JUST_NOW), None, "waits"),
        (Hour(total=Decimal(5), settled_at=LONG_AGO), None, "differs"),
        (Hour(total=Decimal(5), settled_at=LONG_AGO, on_its_way=True), Decimal(7), "waits"),
        (Hour(), Decimal(3), "differs"),  # usage that we never sent
        (Hour(total=Decimal("0.3"), settled_at=LONG_AGO), Decimal("0.30000000000000004"), "agrees"),
        (Hour(total=Decimal(123456789012345), settled_at=LONG_AGO), Decimal(123456789012344), "differs"),
        (Hour(total=Decimal("1234567890123456.789"), settled_at=LONG_AGO), Decimal("1234567890123456.8"), "agrees"),
        (Hour(unknown=UNKNOWN, settled_at=LONG_AGO), Decimal(3), "differs"),  # 3, or 1 and 2
        (Hour(unknown=UNKNOWN, settled_at=LONG_AGO), Decimal(5), "agrees"),
        (Hour(unknown=UNKNOWN, settled_at=JUST_NOW), Decimal(5), "waits"),
        (Hour(unknown=UNKNOWN, settled_at=JUST_NOW), Decimal(6), "agrees"),
        # 1 is confirmed, and so is what the compensation took back: or it lags, and nothing of the unknown was taken.
        (Hour(sent=(9,), takes_back=True, unknown=UNKNOWN[:1], settled_at=JUST_NOW), Decimal(1), "waits"),
        (Hour(sent=(9,), takes_back=True, unknown=UNKNOWN[:1], settled_at=LONG_AGO), Decimal(1), "agrees"),
        (
            Hour(unknown=MANY, settled_at=LONG_AGO),
            None,
            "differs",
        ),
    ],
)
def test_an_hour_agrees_waits_or_differs(hour: Hour, theirs: Decimal | None, verdict: str) -> None:
    assert judge(hour, theirs, "sum", NOW).verdict == verdict


def test_whether_a_zero_was_taken_does_not_matter() -> None:
    hour = Hour(total=Decimal(5), unknown=((1, Decimal(0), 0),), settled_at=LONG_AGO)
    assert judge(hour, Decimal(5), "sum", NOW).taken == (1,)


def test_of_a_last_meter_only_what_may_be_the_latest_is_asked_about() -> None:
    unknown = ((1, Decimal(10), 100), (2, Decimal(20), 300), (3, Decimal(30), 400))
    hour = Hour(latest=Decimal(15), latest_key=(200, 9), sent=(9,), unknown=unknown, settled_at=LONG_AGO)
    judged = judge(hour, Decimal(20), "last", NOW)
    assert (judged.taken, judged.not_taken, judged.superseded) == ((2,), (3,), (1,))
    assert judge(hour, Decimal(15), "last", NOW).not_taken == (2, 3)
    assert judge(hour, None, "last", NOW).verdict == "differs"


@pytest.mark.parametrize(
    ("hour", "formula", "most"),
    [
        (Hour(unknown=MANY[:MOST_UNKNOWN], on_its_way=True), "sum", 0),
        (Hour(unknown=MANY, settled_at=LONG_AGO), "sum", 0),
        (Hour(unknown=MANY[:MOST_UNKNOWN], settled_at=LONG_AGO), "count", 2),
        (Hour(unknown=MANY[:MOST_UNKNOWN], settled_at=LONG_AGO), "sum", 2**MOST_UNKNOWN),
    ],
)
def test_only_what_may_explain_the_number_is_looked_at(
    hour: Hour, formula: str, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four thousand selections take the event loop 20 ms."""
    looked_at = 0

    def count(unknown: list[object], size: int) -> Iterator[tuple[object, ...]]:
        nonlocal looked_at
        for chosen in combinations(unknown, size):
            looked_at += 1
            yield chosen

    monkeypatch.setattr(agreement, "combinations", count)
    assert judge(hour, Decimal(5), formula, NOW).verdict != "agrees"
    assert looked_at == most


@pytest.mark.parametrize(("theirs", "taken"), [(2, 0), (3, None), (4, None), (5, 3)])
def test_of_a_number_only_none_or_all_can_be_told(theirs: int, taken: int | None) -> None:
    hour = Hour(number=2, unknown=UNKNOWN, settled_at=LONG_AGO)
    judged = judge(hour, Decimal(theirs), "count", NOW)
    assert (len(judged.taken) if judged.verdict == "agrees" else None) == taken
