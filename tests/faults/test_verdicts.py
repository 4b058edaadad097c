"""When a run is good: each verdict from given figures, so that every one of them is seen to be able to fail."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest

from tests.faults.checks import Findings
from tests.faults.clients import Book
from tests.faults.load import Comparison, Load
from tests.faults.machine import Machine
from tests.faults.run import Result
from tests.faults.schedule import Fault, Injector, MetNothing
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


class NoMachine(Machine):
    def __init__(self) -> None:
        """Nothing runs."""


def make_result(faults: int = 20, accepted: int = 1, acknowledged: int = 1) -> Result:
    injector = Injector(NoMachine(), Book(), injected=Counter(kill=faults), met_nothing=Counter(kill=50))
    findings = Findings(accepted=accepted, webhooks_sent=1, webhooks_acknowledged=acknowledged)
    return Result(1, 90.0, 60.0, injector, Book(), findings, 20.0)


def test_a_run_of_a_minute_is_good_with_twenty_faults_that_met_something() -> None:
    assert make_result().verdict == "good"


@pytest.mark.parametrize(
    "result",
    [
        make_result(faults=19),
        make_result(accepted=0),
        make_result(acknowledged=0),
        replace(make_result(faults=0), fault_seconds=0.0),
        replace(make_result(), fault_seconds=70.0),
    ],
)
def test_a_run_that_proves_too_little_is_poor(result: Result) -> None:
    assert result.verdict == "poor"
    assert len(result.shortcomings) == 1


def test_a_run_in_which_something_does_not_hold_is_broken() -> None:
    wrong = [make_result() for _ in range(5)]
    wrong[0].findings.lost.append(("product-1", "use-1"))
    wrong[1].findings.doubled.append(("product-1", "use-1"))
    wrong[2].findings.fail("I2", "a sum")
    wrong[3].findings.webhooks_lost.append("evt_1")
    wrong[4].injector.errors.append("kill api-1: MachineError")

    assert [result.verdict for result in wrong] == ["broken"] * 5


async def test_a_fault_counts_only_if_it_met_something(monkeypatch: pytest.MonkeyPatch) -> None:
    async def meet(machine: Machine, fault: Fault) -> None:
        if fault.target == "nothing":
            raise MetNothing
        if fault.target == "trouble":
            raise OSError("it could not be brought")

    monkeypatch.setattr("tests.faults.schedule._ACTS", {"kill": meet})
    injector = Injector(NoMachine(), Book())
    for target in ("api-1", "nothing", "trouble"):
        await injector.strike(Fault("kill", target, 0, 0))

    assert (injector.injected, injector.met_nothing) == ({"kill": 1}, {"kill": 1})
    assert injector.errors == ["kill trouble: OSError it could not be brought"]
