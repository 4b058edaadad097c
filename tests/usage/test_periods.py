from datetime import UTC, datetime, timedelta

import pytest

from tallystick import db
from tallystick.resources import Resources
from tallystick.usage.periods import Period, UsageMoment, find_period, find_periods
from tests.usage.making import CUSTOMER, METER, make_boundaries, make_customer, make_meter, make_period, run

START = datetime(2026, 3, 10, 8, 17, 23, tzinfo=UTC)
END = datetime(2026, 4, 10, 8, 17, 23, tzinfo=UTC)
YEAR_END = datetime(2027, 1, 1, tzinfo=UTC)
SECOND = timedelta(seconds=1)


async def find(
    resources: Resources, at: datetime, *, customer: str | None = CUSTOMER, meter: str = METER, price: str | None = None
) -> Period:
    async with db.transaction(resources.engine) as connection:
        return await find_period(connection, customer, meter, at, price=price)


async def test_the_period_is_that_of_the_subscription_which_bills_the_meter(resources: Resources) -> None:
    await make_customer(resources, boundaries=(START, END, START + timedelta(days=3)))
    await make_meter(resources)
    await make_period(resources, START, END)
    assert await find(resources, START) == Period(START, END, "subscription")
    assert await find(resources, END - SECOND) == Period(START, END, "subscription")
    assert (await find(resources, END)).source == "month"
    assert await find(resources, START, meter="other") == Period(START, START + timedelta(days=3), "boundaries")


async def test_usage_records_have_their_period_by_their_price(resources: Resources) -> None:
    await make_customer(resources)
    await make_meter(resources)
    await make_period(resources, START, END)
    await run(resources, "UPDATE prices SET meter = NULL")
    assert (await find(resources, START)).source == "month"
    assert await find(resources, START, price=f"price_mtr_{METER}") == Period(START, END, "subscription")


@pytest.mark.parametrize(
    ("at", "start", "end"),
    [
        (YEAR_END - SECOND, datetime(2026, 12, 1, tzinfo=UTC), YEAR_END),
        (END, END, datetime(2026, 5, 1, tzinfo=UTC)),
        (END - SECOND, datetime(2026, 4, 1, tzinfo=UTC), END),
    ],
)
async def test_without_a_subscription_it_is_the_month_of_utc_cut_where_a_period_began_or_ended(
    resources: Resources, at: datetime, start: datetime, end: datetime
) -> None:
    await make_customer(resources)
    await make_boundaries(resources, END)
    assert await find(resources, at) == Period(start, end, "month")


async def test_many_are_found_in_their_order(resources: Resources) -> None:
    await make_customer(resources, boundaries=(START, END))
    days = [START + timedelta(days=n) for n in range(3)]
    wanted = [UsageMoment(customer, METER, day) for day in days for customer in (CUSTOMER, None)]
    async with db.transaction(resources.engine) as connection:
        found = await find_periods(connection, wanted)
        assert found == [await find_period(connection, *usage[:3]) for usage in wanted]
    assert [period.source for period in found] == ["boundaries", "month"] * 3
