"""`[meters.NAME]` of the rules file: what may be in it, and what it means for usage that is sent."""

import sys
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI
from structlog.testing import capture_logs

from tallystick.app import create_app
from tallystick.config import Settings
from tallystick.errors import SettingsError
from tallystick.resources import Resources
from tallystick.rules import load_rules
from tallystick.usage.drain import drain
from tallystick.usage.meters import Meter, list_unfit, warn_of_unfit_meters
from tests.conftest import open_client
from tests.usage.making import last_hour, make_meter, read_all

RULES = """
[meters.calls]
properties = ["region", "model"]
thresholds = ["0.5", 1000, "5000"]
quota = "10000"
[meters.users]
aggregation = "unique_count"
property = "user"
[meters.records]
sender = "usage_records"
price = "price_1"
[meters.misfit]
aggregation = "max"
[usage]
late = "carry"
"""


@pytest.fixture
def rules_file(tmp_path: Path) -> Path:
    path = tmp_path / "rules.toml"
    path.write_text(RULES)
    return path


def test_the_rules_of_meters_are_read(rules_file: Path) -> None:
    rules = load_rules(rules_file)
    calls = rules.meters["calls"]
    assert (calls.thresholds, calls.quota) == ((Decimal("0.5"), Decimal(1000), Decimal(5000)), Decimal(10000))
    assert calls.declared == {"region", "model"}
    assert rules.meters["users"].declared == {"user"}
    assert rules.usage.late == "carry"


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ("quota = 1.5", "written as a string"),
        ('quota = "1e3"', "written as a string"),
        ('quota = "0"', "greater than 0"),
        ("quota = true", "written as a string"),
        ('thresholds = ["2", "2.0"]', "greater than the one before"),
        ('sender = "usage_records"', "needs price"),
        ('price = "price_1"', "needs sender"),
        ('sender = "usage_records"\nprice = "price_2"\naggregation = "max"', "which add up"),
        ('aggregation = "unique_count"', "needs property"),
        ('property = "user"', "needs aggregation"),
        ('aggregation = "max"\nproperty = "user"', "needs aggregation"),
        ('aggregation = "average"', "'max' or 'unique_count'"),
        ('properties = ["a", "a"]', "named twice"),
        (f"properties = {list('abcdefghijk')}", "at most 10"),
        ('properties = ["a\\u0000"]', "pattern"),
        ("unheard_of = 1", "there is no such entry; there are: sender, price"),
        (
            'sender = "usage_records"\nprice = "price_1"\n[meters.b]\nsender = "usage_records"\nprice = "price_1"',
            "same",
        ),
    ],
)
def test_rules_that_make_no_sense_are_refused_by_name(tmp_path: Path, lines: str, reason: str) -> None:
    path = tmp_path / "rules.toml"
    path.write_text(f"[meters.a]\n{lines}\n")
    with pytest.raises(SettingsError, match=reason) as refused:
        load_rules(path)
    assert "meters" in str(refused.value)


@pytest.fixture
async def ruled(
    settings: Settings, rules_file: Path, api_key: str, resources: Resources
) -> AsyncIterator[tuple[httpx.AsyncClient, FastAPI]]:
    """A client of an application with these rules, whose meters exist."""
    for name, formula in (("calls", "sum"), ("users", "last"), ("misfit", "sum"), ("counted", "count")):
        await make_meter(resources, name, formula=formula)
    await make_meter(resources, "windowed", event_time_window="hour")
    application = create_app(settings.model_copy(update={"rules_file": rules_file}))
    async with application.router.lifespan_context(application), open_client(application, api_key) as client:
        yield client, application


def event(id: str, meter: str, **changed: object) -> dict[str, object]:
    return {"id": id, "customer": "acme", "meter": meter, "timestamp": last_hour().isoformat()} | changed


async def test_each_event_is_held_against_its_meter_and_what_the_rules_say_of_it(
    ruled: tuple[httpx.AsyncClient, FastAPI], resources: Resources
) -> None:
    client, application = ruled
    answer = await client.post(
        "/v1/usage",
        json=[
            event("1", "calls", properties={"region": "eu", "model": None}),
            event("2", "users", properties={"user": "ann"}),
            event("3", "records", value=7),
            event("4", "counted"),
            event("5", "counted", value="1.0"),
            event("a", "calls", properties={"region": "eu", "user": "ann"}),
            event("b", "users"),
            event("c", "records", value="0.5"),
            event("d", "counted", value=2),
            event("e", "misfit"),
            event("f", "counted", properties={"region": "eu"}),
            event("g", "windowed"),
            event("h", "calls", properties=["region"]),
            event("i", "calls", properties={"region": 7}),
            event("j", "calls", properties=dict.fromkeys(map(str, range(11)), "x")),
        ],
    )
    body = answer.json()
    assert body["accepted"] == 5
    assert [(bad["id"], bad["code"]) for bad in body["rejected"]] == [
        ("a", "unknown_property"),
        ("b", "missing_property"),
        ("c", "invalid_value"),
        ("d", "invalid_value"),
        ("e", "unsupported_meter"),
        ("f", "unknown_property"),
        ("g", "unsupported_meter"),
        ("h", "invalid_field"),
        ("i", "invalid_field"),
        ("j", "invalid_field"),
    ]
    assert "there are: model, region" in body["rejected"][0]["message"]
    await drain(application.state.resources, datetime.now(UTC))
    assert await read_all(resources, "SELECT meter, aggregation FROM usage_totals ORDER BY 1") == [
        ("calls", "sum"),
        ("counted", "count"),
        ("records", "sum"),
        ("users", "unique_count"),
    ]
    assert await read_all(resources, "SELECT property, value, quantity FROM usage_group_totals") == [
        ("region", "eu", 1)
    ]


async def test_of_a_cloudevents_data_the_declared_members_are_properties(
    ruled: tuple[httpx.AsyncClient, FastAPI], resources: Resources
) -> None:
    client, application = ruled
    cloudevent = {"specversion": "1.0", "id": "1", "source": "/eu", "type": "calls", "subject": "acme"}
    data = {"value": "2", "region": "eu", "of": ["another", "consumer"]}
    headers = {"Content-Type": "application/cloudevents+json"}
    answer = await client.post("/v1/usage", json=cloudevent | {"data": data}, headers=headers)
    assert answer.json()["accepted"] == 1
    as_json = event("/eu 1", "calls", timestamp=None, value=2, properties={"region": "eu"})
    assert (await client.post("/v1/usage", json=as_json)).json()["duplicates"] == 1
    answer = await client.post("/v1/usage", json=cloudevent | {"data": data | {"region": 7}}, headers=headers)
    assert answer.json()["rejected"][0]["message"].startswith("The field 'data.region'")
    await drain(application.state.resources, datetime.now(UTC))
    assert await read_all(resources, "SELECT properties FROM usage_events") == [({"region": "eu"},)]


async def test_on_the_direct_path_the_rules_hold_too(
    ruled: tuple[httpx.AsyncClient, FastAPI], resources: Resources
) -> None:
    client, application = ruled
    application.state.breaker.until = sys.maxsize
    answer = await client.post("/v1/usage", json=event("1", "users", properties={"user": "ann"}))
    assert answer.status_code == 202
    assert await read_all(resources, "SELECT aggregation, quantity FROM usage_totals") == [("unique_count", 1)]


def meter(name: str, formula: str, status: str = "active") -> Meter:
    return Meter(f"mtr_{name}", name, formula, "customer", "value", None, status)


def test_every_misfit_of_rules_and_meters_is_named(rules_file: Path) -> None:
    rules = load_rules(rules_file).meters
    meters = {"calls": meter("calls", "sum"), "users": meter("users", "last"), "records": meter("records", "sum")}
    meters |= {"misfit": meter("misfit", "count"), "gone": meter("gone", "sum", "inactive"), "new": meter("new", "p99")}
    assert list(list_unfit(meters, rules)) == ["misfit", "new", "records"]
    del meters["misfit"], meters["records"]
    unfit = list_unfit(meters, rules)
    assert list(unfit) == ["misfit", "new"]
    assert "Stripe does not have" in unfit["misfit"]


async def test_a_worker_names_each_misfit_when_it_starts(ruled: tuple[httpx.AsyncClient, FastAPI]) -> None:
    _, application = ruled
    with capture_logs() as logs:
        await warn_of_unfit_meters(application.state.resources, datetime.now(UTC))
    assert [(line["event"], line["log_level"]) for line in logs] == [("meter_unfit", "warning")] * 2
    assert "'misfit'" in logs[0]["reason"]
    assert "'windowed'" in logs[1]["reason"]
