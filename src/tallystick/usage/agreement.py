"""Whether an hour's usage at Stripe is what was sent: no database, no clock, only the numbers of both sides.

What Stripe says of an hour depends on the meter's formula: the sum of its meter events, their number, or the latest
value. Deliveries whose outcome nobody knows are part of the question: Stripe took some of them, and perhaps only one
selection of them explains Stripe's number.
"""

from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal, localcontext
from itertools import combinations
from typing import Literal

# Stripe says no more than that summaries lag (https://docs.stripe.com/billing/subscriptions/usage-based/recording-usage).
# A day is far beyond what is usual, and short enough to tell somebody while a period is open.
LAG = timedelta(hours=24)

# 4,096 selections; with more of them in one hour, several would explain any number.
MOST_UNKNOWN = 12

# Stripe says the value as a JSON number, in binary floating point on its way: 15 digits of it are right.
DIGITS = 15

Verdict = Literal["agrees", "waits", "differs"]


@dataclass(frozen=True)
class Hour:
    """One hour of what was sent to one meter for one customer.

    `total`, `number`, `latest` and `latest_key` (Unix seconds, id) are of the deliveries that Stripe took; `sent` are
    the ids of those among them that are not confirmed, and `takes_back` says that one of these has a negative value.
    `unknown` are the others that it may have taken: id, value, Unix seconds. `on_its_way`: one is being tried.
    `settled_at`: when the last of all was settled.
    """

    total: Decimal = Decimal(0)
    number: int = 0
    latest: Decimal | None = None
    latest_key: tuple[int, int] | None = None
    sent: tuple[int, ...] = ()
    takes_back: bool = False
    unknown: tuple[tuple[int, Decimal, int], ...] = ()
    on_its_way: bool = False
    settled_at: datetime | None = None


@dataclass(frozen=True)
class Judgement:
    """What is to be done. `ours` is the number that Stripe's was compared with; the others are ids of deliveries.

    `confirmed` were sent and are found; of those with an unknown outcome `taken` are found, `not_taken` are not, and of
    `superseded` it no longer matters, because a later value of the same hour is what counts.
    """

    verdict: Verdict
    ours: Decimal
    confirmed: tuple[int, ...] = ()
    taken: tuple[int, ...] = ()
    not_taken: tuple[int, ...] = ()
    superseded: tuple[int, ...] = ()


def judge(hour: Hour, theirs: Decimal | None, formula: str, now: datetime) -> Judgement:
    """Compare an hour with Stripe's value of it; None: Stripe has no value there."""
    settled = hour.settled_at is None or hour.settled_at <= now - LAG
    ours = _known(hour, formula) or Decimal(0)
    if hour.on_its_way:
        return Judgement("waits", ours)
    if theirs is None and formula != "last":
        theirs = Decimal(0)
    # With several no one knows which; and while summaries may lag, a part of what was taken may look like another part.
    fitting = _find_fitting(hour, theirs, formula)
    if len(fitting) != 1 or not (settled or fitting[0].whole):
        return Judgement("differs" if settled else "waits", ours)
    return Judgement(
        "agrees", ours, hour.sent, fitting[0].taken, fitting[0].not_taken, superseded=fitting[0].superseded
    )


@dataclass(frozen=True)
class _Explanation:
    """What Stripe would say, had it taken these of the unknown ones. `whole`: nothing that lags could add to it."""

    value: Decimal | None
    whole: bool
    taken: tuple[int, ...] = ()
    not_taken: tuple[int, ...] = ()
    superseded: tuple[int, ...] = ()


def _known(hour: Hour, formula: str) -> Decimal | None:
    """What Stripe would say, had it taken none of the unknown ones."""
    if formula == "last":
        return hour.latest
    return Decimal(hour.number) if formula == "count" else hour.total


def _find_fitting(hour: Hour, theirs: Decimal | None, formula: str) -> list[_Explanation]:
    """What would explain Stripe's value; nothing where there is too much to choose from."""
    if len(hour.unknown) > MOST_UNKNOWN:
        return []
    explanations = _explain_last(hour) if formula == "last" else _explain_sum(hour, formula)
    return [explanation for explanation in explanations if _equal(explanation.value, theirs)]


def _explain_sum(hour: Hour, formula: str) -> list[_Explanation]:
    """One explanation for each selection of the unknown ones that may be the only one with its value."""
    # Whether a 0 was taken changes nothing, and so nothing could tell.
    idle = tuple(id for id, value, _ in hour.unknown if formula == "sum" and value == 0)
    unknown = [(id, value) for id, value, _ in hour.unknown if id not in idle]
    # Else Stripe may have more than all of it as long as what takes usage back is not in its summary yet.
    only_grows = formula == "count" or not (hour.takes_back or any(value < 0 for _, value in unknown))
    # A number between none and all of them fits several selections.
    sizes = {0, len(unknown)} if formula == "count" else range(len(unknown) + 1)
    known = _known(hour, formula) or Decimal(0)
    explanations = []
    with localcontext(prec=200):  # the default context would round at 28 digits
        for chosen in (chosen for size in sizes for chosen in combinations(unknown, size)):
            added = Decimal(len(chosen)) if formula == "count" else sum((value for _, value in chosen), Decimal(0))
            taken = tuple(id for id, _ in chosen)
            not_taken = tuple(id for id, _ in unknown if id not in taken)
            whole = not unknown or (only_grows and not not_taken)
            explanations.append(_Explanation(known + added, whole, taken + idle, not_taken))
    return explanations


def _explain_last(hour: Hour) -> list[_Explanation]:
    """One explanation for each value that may be the latest that was taken, first that of those known to be taken."""
    unknown = sorted(hour.unknown, key=lambda each: (each[2], each[0]))
    after = [each for each in unknown if hour.latest_key is None or (each[2], each[0]) > hour.latest_key]
    ids = [id for id, _, _ in after]
    before = tuple(id for id, _, _ in unknown if id not in ids)
    explanations = [_Explanation(hour.latest, not after, (), tuple(ids), before)]
    for number, (id, value, _) in enumerate(after):
        later = tuple(ids[number + 1 :])
        explanations.append(_Explanation(value, not later, (id,), later, before + tuple(ids[:number])))
    return explanations


def _equal(ours: Decimal | None, theirs: Decimal | None) -> bool:
    """Whether both say the same, to the 15 digits that Stripe's number has; None is no value, and not 0."""
    if ours is None or theirs is None:
        return ours is None and theirs is None
    with localcontext(prec=200):
        unit = Decimal(1).scaleb(max(ours.adjusted(), theirs.adjusted()) - DIGITS + 1)
        return ours == theirs or abs(ours - theirs) < unit
