from bisect import bisect_right
from collections import defaultdict
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from hashlib import blake2b
from typing import Any, NamedTuple
from zoneinfo import ZoneInfo

import httpx
import pytest
from fastapi import FastAPI
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import text

from tallystick import db
from tallystick.errors import InvalidRequest
from tallystick.resources import Resources
from tallystick.rules import Rules
from tallystick.usage.buckets import find_bucket
from tallystick.usage.ledger import record_events
from tallystick.usage.query import ADD_UP, Question, add_up_usage
from tallystick.usage.windows import list_starts
from tests.conftest import empty_stores
from tests.usage.making import CUSTOMER, REF, make_customer, make_event, make_meter, make_period, run

FROM = datetime(2026, 10, 20, tzinfo=UTC)  # Berlin's clock goes back on the 25th, New York's on November 1st
TO = FROM + timedelta(days=20)
ANCHORS = (FROM + timedelta(days=3, hours=5, seconds=17), FROM + timedelta(days=11, minutes=59, seconds=1))
AGGREGATIONS = ("sum", "count", "last", "max", "unique_count")
RULES = Rules.model_validate({"meters": {name: {"properties": ["region"]} for name in ("sum", "count")}})


class Use(NamedTuple):
    ref: str
    meter: str
    at: datetime
    value: Decimal
    region: str | None


uses = st.lists(
    st.builds(
        Use,
        st.sampled_from([REF, "acme-eu", CUSTOMER]),
        st.sampled_from(AGGREGATIONS),
        st.one_of(
            st.datetimes(FROM.replace(tzinfo=None), (TO - timedelta(seconds=1)).replace(tzinfo=None)),
            st.sampled_from(
                [at.replace(tzinfo=None) for anchor in ANCHORS for at in (anchor, anchor - timedelta(microseconds=1))]
            ),
        ).map(lambda at: at.replace(tzinfo=UTC)),
        st.decimals(-100, 100, places=3).map(lambda value: value.normalize())
        | st.sampled_from([Decimal(7), Decimal(8)]),
        st.sampled_from([None, "eu", "us"]),
    ),
    min_size=10,  # a window with one event says nothing about how several are put together
    max_size=40,
    unique_by=lambda use: use.at,
)


async def write_totals(resources: Resources, used: Sequence[Use]) -> None:
    """The totals as the ledger keeps them, one row a bucket."""
    totals: dict[Any, list[Use]] = defaultdict(list)
    for use in used:
        totals[use.ref, use.meter, find_bucket(use.at, ANCHORS)].append(use)
    async with db.transaction(resources.engine) as connection:
        for (ref, meter, (start, end)), parts in totals.items():
            latest = max(parts, key=lambda use: use.at)
            total = await connection.scalar(
                text("""
                    INSERT INTO usage_totals (customer_ref, meter, bucket_start, bucket_end, aggregation, quantity,
                                              events, last_at, last_key)
                    VALUES (:ref, :meter, :start, :end, :meter, :quantity, :events, :at, 'key') RETURNING id
                """),
                {
                    "ref": ref, "meter": meter, "start": start, "end": end, "quantity": aggregate(meter, parts),
                    "events": len(parts), "at": latest.at,
                },
            )  # fmt: skip
            for value in {use.value for use in parts} if meter == "unique_count" else ():
                await connection.execute(
                    text("INSERT INTO usage_uniques VALUES (:total, :digest)"),
                    {"total": total, "digest": blake2b(str(value).encode(), digest_size=16).digest()},
                )
            for region in {use.region for use in parts if use.region and meter in ("sum", "count")}:
                of = [use for use in parts if use.region == region]
                await connection.execute(
                    text("INSERT INTO usage_group_totals VALUES (:total, 'region', :region, :quantity, :events)"),
                    {"total": total, "region": region, "quantity": aggregate(meter, of), "events": len(of)},
                )


def aggregate(meter: str, used: Sequence[Use]) -> Decimal:
    match meter:
        case "sum":
            return sum((use.value for use in used), Decimal(0))
        case "max":
            return max(use.value for use in used)
        case "last":
            return max(used, key=lambda use: use.at).value
        case "unique_count":
            return Decimal(len({use.value for use in used}))
    return Decimal(len(used))


def place(at: datetime, window: str, zone: str) -> object:
    """Which window an instant is in, found by what a wall clock shows."""
    local = at.astimezone(ZoneInfo(zone))
    match window:
        case "hour":
            return local.replace(minute=0, second=0, microsecond=0).isoformat()
        case "day":
            return local.date()
        case "month":
            return local.year, local.month
    return bisect_right(ANCHORS, at)


async def prepare(resources: Resources) -> None:
    await empty_stores(resources)
    await make_customer(resources, boundaries=ANCHORS)
    async with db.transaction(resources.engine) as connection:
        await connection.execute(
            text("INSERT INTO customer_links (ref, customer) VALUES ('acme-eu', :customer)"), {"customer": CUSTOMER}
        )


@given(
    uses,
    st.sampled_from(["hour", "day", "month", "billing_period"]),
    st.sampled_from(["UTC", "Europe/Berlin", "America/New_York"]),
    st.sampled_from([None, "region"]),
    st.sampled_from([FROM, ANCHORS[0]]),
)
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
async def test_every_window_says_what_the_single_events_come_to(
    resources: Resources, used: list[Use], window: Any, zone: str, group_by: str | None, start: datetime
) -> None:
    await prepare(resources)
    await write_totals(resources, used)
    expected: dict[Any, list[Use]] = defaultdict(list)
    for use in used:
        if use.at >= start and (group_by is None or use.meter in ("sum", "count")):
            expected[use.meter, place(use.at, window, zone), use.region if group_by else None].append(use)
    question = Question(REF, None, start, TO, window, zone, group_by)
    async with db.transaction(resources.engine) as connection:
        customer, rows = await add_up_usage(connection, question, RULES)
    assert customer == CUSTOMER
    found = {(row.meter, place(row.start, window, zone), row.group): (row.quantity, row.events) for row in rows}
    assert len(found) == len(rows)
    assert found == {key: (aggregate(key[0], parts), len(parts)) for key, parts in expected.items()}
    assert all(
        place(row.end - timedelta(microseconds=1), window, zone) == place(row.start, window, zone) for row in rows
    )


async def ask(resources: Resources, **changed: Any) -> Any:
    values = {"ref": REF, "meter": None, "from_": FROM, "to": TO, "window": "day"} | changed
    async with db.transaction(resources.engine) as connection:
        return (await add_up_usage(connection, Question(**values), RULES))[1]


async def test_a_zone_whose_days_begin_within_an_hour_is_refused_by_name(resources: Resources) -> None:
    await prepare(resources)
    with pytest.raises(InvalidRequest, match="A day of Asia/Kolkata begins at 18:30 UTC"):
        await ask(resources, time_zone="Asia/Kolkata")
    assert await ask(resources, time_zone="Asia/Kolkata", window="billing_period") == []


@pytest.mark.parametrize(
    "zone", ["Mars/Olympus", "Europe", "../etc/passwd", "/etc/passwd", "Europe/Berlin\n", "x" * 60]
)
async def test_a_zone_that_does_not_exist_is_refused(resources: Resources, zone: str) -> None:
    with pytest.raises(InvalidRequest, match="There is no time zone"):
        await ask(resources, time_zone=zone)


def test_a_day_begins_where_the_clock_is_put_forward_over_midnight() -> None:
    starts = list_starts(
        datetime(2026, 3, 7, 5, tzinfo=UTC), datetime(2026, 3, 9, 12, tzinfo=UTC), "day", "America/Havana"
    )
    assert starts[1:] == [datetime(2026, 3, 8, 5, tzinfo=UTC), datetime(2026, 3, 9, 4, tzinfo=UTC)]


def test_a_day_that_a_zone_left_out_has_no_window() -> None:
    starts = list_starts(
        datetime(2011, 12, 29, 10, tzinfo=UTC), datetime(2012, 1, 1, 10, tzinfo=UTC), "day", "Pacific/Apia"
    )
    assert starts == sorted(set(starts))
    assert len(starts) == 3


@pytest.mark.parametrize(("meter", "group_by"), [(None, "colour"), ("sum", "colour"), ("last", "region")])
async def test_a_property_that_is_not_declared_is_refused_by_name(
    resources: Resources, meter: str | None, group_by: str
) -> None:
    with pytest.raises(InvalidRequest, match=f"'{group_by}'"):
        await ask(resources, meter=meter, group_by=group_by)


async def test_a_meter_whose_quantities_do_not_add_up_is_not_grouped(resources: Resources) -> None:
    await prepare(resources)
    await write_totals(resources, [Use(REF, "last", FROM, Decimal(1), None)])
    async with db.transaction(resources.engine) as connection:
        await connection.execute(text("UPDATE usage_totals SET meter = 'sum'"))
    with pytest.raises(InvalidRequest, match="The quantities of the meter 'sum' do not add up"):
        await ask(resources, group_by="region")


async def test_usage_that_no_subscription_bills_is_shown_as_such(resources: Resources) -> None:
    await prepare(resources)
    await make_meter(resources, "sum")
    await make_period(resources, ANCHORS[0], ANCHORS[1], meter="sum")
    await write_totals(
        resources,
        [Use(REF, meter, at, Decimal(1), None) for meter in ("sum", "max") for at in (FROM, ANCHORS[0], ANCHORS[1])],
    )
    rows = await ask(resources, window="billing_period")
    assert [(row.meter, row.start, row.end, row.subscribed) for row in rows if row.meter == "sum"] == [
        ("sum", FROM, ANCHORS[0], False),
        ("sum", ANCHORS[0], ANCHORS[1], True),
        ("sum", ANCHORS[1], TO, False),
    ]
    assert not any(row.subscribed for row in rows if row.meter == "max")


async def test_an_end_within_an_hour_that_is_no_boundary_is_refused(client: httpx.AsyncClient) -> None:
    for name in ("from", "to"):
        times = {"from": "2026-01-01T00:00:00Z", "to": "2026-01-02T00:00:00Z"} | {name: "2026-01-01T12:30:00Z"}
        answer = await client.get("/v1/usage", params={"customer": REF, **times})
        assert (answer.status_code, answer.json()["field"]) == (422, name)


async def test_the_present_period_is_asked_for_without_its_dates(
    client: httpx.AsyncClient, resources: Resources
) -> None:
    now = datetime.now(UTC)
    began = now.replace(microsecond=0) - timedelta(days=3, seconds=7)
    await make_customer(resources, boundaries=(began,))
    await make_meter(resources)
    await make_period(resources, began, began + timedelta(days=30))
    events = [make_event("before", at=began - timedelta(microseconds=1)), make_event("in", at=began, value="2.5")]
    async with db.transaction(resources.engine) as connection:
        await record_events(connection, events, accepted_already=True)
    answer = await client.get("/v1/usage", params={"customer": REF, "window": "billing_period"})
    (row,) = answer.json()["data"]
    assert (row["quantity"], row["subscribed"], datetime.fromisoformat(row["start"])) == ("2.5", True, began)


async def ask_for_the_present_period(client: httpx.AsyncClient, **more: str) -> list[tuple[str, str, datetime]]:
    answer = await client.get("/v1/usage", params={"customer": REF, "window": "billing_period"} | more)
    assert answer.status_code == 200, answer.text
    return [(row["meter"], row["quantity"], datetime.fromisoformat(row["start"])) for row in answer.json()["data"]]


async def test_of_several_present_periods_none_is_shown_in_part(
    client: httpx.AsyncClient, app: FastAPI, resources: Resources
) -> None:
    now = datetime.now(UTC).replace(microsecond=0)
    began = {"a": now - timedelta(days=20, seconds=3), "b": now - timedelta(days=2), "c": now - timedelta(days=9)}
    await make_customer(resources, boundaries=tuple(began.values()))
    for meter in ("a", "b"):
        await make_meter(resources, meter)
        await make_period(resources, began[meter], began[meter] + timedelta(days=30), meter=meter)
        await run(resources, "UPDATE billing_periods SET item = price")
    # Usage records have no meter at Stripe; the year of a flat fee bills no usage.
    await run(resources, "INSERT INTO prices (id) VALUES ('price_c'), ('price_flat')")
    for price, start, days in (("price_c", began["c"], 30), ("price_flat", now - timedelta(days=300), 365)):
        await run(
            resources,
            "INSERT INTO billing_periods (item, price, period_start, period_end, subscription, customer)"
            " VALUES (:price, :price, :start, :end, 'sub_cus_acme', 'cus_acme')",
            price=price, start=start, end=start + timedelta(days=days),
        )  # fmt: skip
    rules = Rules.model_validate({"meters": {"c": {"sender": "usage_records", "price": "price_c"}}})
    app.state.resources.rules.rules = rules
    events = [make_event(meter, at=start, value="2.5", meter=meter) for meter, start in began.items()]
    async with db.transaction(resources.engine) as connection:
        await record_events(connection, events, accepted_already=True, rules=rules.meters)
    shown = [(meter, "2.5", start) for meter, start in began.items()]
    for used in shown:
        assert await ask_for_the_present_period(client, meter=used[0]) == [used]
    assert sorted(await ask_for_the_present_period(client)) == shown


async def test_a_period_that_has_ended_is_not_the_present_one(client: httpx.AsyncClient, resources: Resources) -> None:
    now = datetime.now(UTC)
    await make_customer(resources)
    await make_meter(resources)
    await make_period(resources, now - timedelta(days=400), now - timedelta(days=370))
    answer = (await client.get("/v1/usage", params={"customer": REF, "window": "billing_period"})).json()
    assert datetime.fromisoformat(answer["from"]) == now.replace(day=1, hour=0, minute=0, second=0, microsecond=0)


async def test_a_year_of_hours_among_ten_thousand_customers_is_found_by_index(resources: Resources) -> None:
    await make_customer(resources)
    others, own = "'customer-' || c", f"'{REF}'"
    async with db.transaction(resources.engine) as connection:
        for ref, hours in (
            (others, "generate_series(1, 10000) c, generate_series(1, 2) h"),
            (own, "generate_series(0, 8759) h"),
        ):
            await connection.execute(
                text(f"""
                    INSERT INTO usage_totals (customer_ref, meter, bucket_start, bucket_end, quantity, events)
                    SELECT {ref}, 'calls', at, at + interval '1 hour', 1, 1
                      FROM {hours}, LATERAL (SELECT timestamptz '2025-01-01Z' + h * interval '1 hour' AS at) b
                """)  # noqa: S608  constants
            )
        await connection.execute(text("ANALYZE usage_totals"))
    start, end = datetime(2025, 1, 1, tzinfo=UTC), datetime(2026, 1, 1, tzinfo=UTC)
    rows = await ask(resources, window="month", from_=start, to=end)
    assert sum(row.events for row in rows) == 8760
    parameters = {"refs": [REF, CUSTOMER], "meters": None, "from": start, "to": end, "edges": [start, end]}
    async with db.transaction(resources.engine) as connection:
        plan = "\n".join(await connection.scalars(text(f"EXPLAIN {ADD_UP.text}"), parameters))
    assert "Index" in plan
    assert "Seq Scan on usage_totals" not in plan
