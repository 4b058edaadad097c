"""The benchmarks measure something and notice what is missing: each in a tiny size, on one stack."""

from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace

import pytest
from benchmarks.access import measure_access
from benchmarks.flush import measure_flush
from benchmarks.growth import measure_growth
from benchmarks.load import WrongAnswer
from benchmarks.memory import measure_memory
from benchmarks.query import measure_query
from benchmarks.report import CheckFailed, Report
from benchmarks.rig import Rig, open_rig
from benchmarks.usage import measure_batch, measure_single, measure_sustained
from benchmarks.webhooks import measure_webhooks
from rich.console import Console
from rich.progress import Progress
from sqlalchemy import text

# A stack takes seconds to start, and so does the worker that some benchmarks use.
pytestmark = pytest.mark.timeout(180)

Measure = Callable[[Rig], Awaitable[Report]]


@pytest.fixture(scope="module")
async def rig() -> AsyncIterator[Rig]:
    console = Console(quiet=True)
    with Progress(console=console) as bars:
        async with open_rig(console, bars, rounds=1, seconds=0.05, sizes=(10,)) as opened:
            yield opened


async def test_every_benchmark_measures_and_finds_everything_there(rig: Rig) -> None:
    for measure, sizes in (
        (measure_webhooks, (10,)),
        (measure_batch, (10,)),
        (measure_single, (10,)),
        (measure_sustained, (10,)),
        (measure_flush, (10,)),
        (measure_access, (10,)),
        (measure_query, (1, 2)),
        (measure_growth, (500, 5_000)),
        (measure_memory, (1_000,)),
    ):
        report = await measure(replace(rig, sizes=sizes))

        figures = report.figures()
        assert figures["checked"], figures
        assert all(side.rate > 0 for side in report.sides), figures
        # The system counts in hundredths of a second, which is more than what some sides do in a twentieth of one.
        assert any(side.busy() for side in report.sides), figures
        assert (report.ratio is not None) == (report.yardstick is not None)
        assert report.targets, figures


@pytest.mark.parametrize(
    ("measure", "table", "fault", "notice"),
    [
        (measure_webhooks, "invoices", "NEW.mark_event := 'evt_another'; RETURN NEW", "do not show the last"),
        (measure_access, "customer_access", "NEW.access := 'none'; RETURN NEW", "asked for"),
        (measure_query, "usage_totals", "NEW.quantity := NEW.quantity + 1; RETURN NEW", "customer"),
        (measure_single, "usage_events", "RETURN NULL", "in the ledger"),
        (
            measure_flush,
            "usage_deliveries",
            'NEW.payload := NEW.payload || \'{"value": "9"}\'; RETURN NEW',
            "totals of",
        ),
    ],
    ids=["webhooks", "access", "query", "usage", "flush"],
)
async def test_a_benchmark_fails_when_something_is_lost_or_wrong(
    rig: Rig, measure: Measure, table: str, fault: str, notice: str
) -> None:
    await rig.fill(text(f"CREATE FUNCTION spoil() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN {fault}; END$$"))
    await rig.fill(
        text(f"CREATE TRIGGER spoil BEFORE INSERT OR UPDATE ON {table} FOR EACH ROW EXECUTE FUNCTION spoil()")
    )
    try:
        # Warming up is checked, too.
        with pytest.raises((CheckFailed, WrongAnswer), match=notice):
            await measure(replace(rig, rounds=0, sizes=(2,)))
    finally:
        await rig.fill(text("DROP FUNCTION spoil CASCADE"))
