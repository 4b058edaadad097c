"""When a run is good: each verdict from given figures, so that every one of them is seen to be able to fail."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest

from tests.faults.load import Comparison, Load
from tests.faults.soak import judge, slope_per_hour


def make_load(accepted: int, milliseconds: float, *, refused: int = 0, **changed: int) -> Load:
    return Load(5.0, Counter(), [milliseconds / 1000] * accepted, [0.01] * refused, **changed)


def make_comparison() -> Comparison:
    over = [make_load(8_000, 40, refused=5_000) for _ in range(3)]
    return Comparison(make_load(10_000, 20), [make_load(5_000, 10) for _ in range(3)], over)


def test_a_load_is_good_when_what_is_accepted_at_overload_is_quick_and_enough() -> None:
    assert make_comparison().shortcomings() == []


@pytest.mark.parametrize(
    ("overs", "named"),
    [
        (lambda: make_load(1, 40, refused=13_000), "less than 33%"),
        (lambda: make_load(0, 0, refused=13_000), "too few for a p99"),
        (lambda: make_load(3_000, 40, refused=9_000), "less than 33%"),
        (lambda: make_load(8_000, 51, refused=5_000), "more than 5 times"),
        (lambda: make_load(8_000, 40, refused=5_000, broken=1), "3 connections were broken"),
        (lambda: make_load(8_000, 40, refused=5_000, without_retry_after=1), "3 were refused and not told"),
        (lambda: make_load(8_000, 40), "nothing was refused"),
    ],
)
def test_a_load_is_not_good_when_overload_shows(overs: Callable[[], Load], named: str) -> None:
    compared = replace(make_comparison(), overs=[overs() for _ in range(3)])
    assert any(named in shortcoming for shortcoming in compared.shortcomings()), compared.shortcomings()


def test_a_load_is_not_good_when_half_of_it_is_refused_broken_or_little() -> None:
    for half, named in (
        (make_load(5_000, 10, refused=1), "refused at half load"),
        (make_load(5_000, 10, broken=1), "connections were broken"),
        (make_load(999, 10), "too few for a p99"),
    ):
        compared = replace(make_comparison(), halves=[half] * 3)
        assert [named in shortcoming for shortcoming in compared.shortcomings()] == [True]


def test_a_soak_is_good_when_nearly_all_is_accepted_and_nothing_grows() -> None:
    assert judge(1_000, 990, 10, {"memory_mb api-1": 60.0, "lag_seconds": -5.0}) == []


@pytest.mark.parametrize(
    ("due", "accepted", "samples", "slope", "named"),
    [
        (1_000, 0, 10, 0.0, "0 of 1000 requests"),
        (1_000, 989, 10, 0.0, "989 of 1000 requests"),
        (0, 0, 10, 0.0, "0 of 0 requests"),
        (1_000, 1_000, 9, 0.0, "too few"),
        (1_000, 1_000, 10, 60.1, "memory_mb api-1 grows by 60.1"),
    ],
)
def test_a_soak_is_not_good_when(due: int, accepted: int, samples: int, slope: float, named: str) -> None:
    shortcomings = judge(due, accepted, samples, {"memory_mb api-1": slope})
    assert [named in shortcoming for shortcoming in shortcomings] == [True]


def test_a_slope_is_that_of_the_line_in_an_hour() -> None:
    assert slope_per_hour([(0, 1.0), (1, 2.0), (2, 3.0)]) == pytest.approx(3600)
