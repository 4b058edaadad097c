import asyncio
import json
from datetime import UTC, datetime, timedelta

import pytest
from typer.testing import CliRunner, Result

from tallystick import cli
from tallystick.resources import Resources
from tests.conftest import FakeStripe
from tests.usage.making import (
    CUSTOMER,
    METER,
    REF,
    last_hour,
    make_customer,
    make_invoice,
    make_meter,
    make_period,
    run,
)
from tests.usage.test_delivery import make_deliveries
from tests.usage.test_reconciliation import deliver, lose


@pytest.fixture
def environment(resources: Resources, fake_stripe_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "DATABASE_URL": resources.settings.database_url.replace("+asyncpg", ""),
        "REDIS_URL": resources.settings.redis_url,
        "STRIPE_API_KEY": "sk_test_for_tests",
        "STRIPE_WEBHOOK_SECRET": "whsec_for_tests",
        "STRIPE_API_BASE": fake_stripe_url,
    }.items():
        monkeypatch.setenv(name, value)


async def tallystick(*arguments: str) -> Result:
    return await asyncio.to_thread(CliRunner().invoke, cli.app, list(arguments), catch_exceptions=False)


@pytest.mark.usefixtures("environment")
async def test_reconcile_proves_a_customers_usage_and_asks_stripe(
    resources: Resources, fake_stripe: FakeStripe
) -> None:
    customer = await make_deliveries(resources, fake_stripe, "5", "7")
    await deliver(resources)
    proved = await tallystick("reconcile", "--json")
    assert (proved.exit_code, json.loads(proved.stdout)["parts"][0]["quantity"]["sent"]) == (0, "12")
    asked = json.loads((await tallystick("reconcile", "--stripe", "--customer", REF, "--json")).stdout)
    assert (asked["good"], asked["compared_with_stripe"]) == (True, 1)
    assert asked["parts"][0]["quantity"]["confirmed"] == "12"
    table = await tallystick("reconcile", "--from", (last_hour(0) - timedelta(days=1)).isoformat())
    assert "Everything is accounted for." in table.stdout
    assert customer in table.stdout


@pytest.mark.usefixtures("environment")
async def test_reconcile_fails_on_a_drift_and_on_a_difference(resources: Resources, fake_stripe: FakeStripe) -> None:
    await make_deliveries(resources, fake_stripe, "5", "7")
    await deliver(resources)
    await lose(fake_stripe, resources, 5)
    await run(resources, "UPDATE usage_deliveries SET settled_at = settled_at - interval '25 hours'")
    drifting = await tallystick("reconcile", "--stripe")
    assert drifting.exit_code == 1
    assert "sent 5, Stripe says 0" in drifting.stdout
    await run(resources, "UPDATE usage_drifts SET resolved_at = now()")
    assert (await tallystick("reconcile", "--customer", REF)).exit_code == 0
    assert (await tallystick("reconcile", "--meter", METER)).exit_code == 0
    await run(resources, "DELETE FROM usage_deliveries WHERE value = 5")
    assert (await tallystick("reconcile", "--meter", METER)).exit_code == 1


@pytest.mark.usefixtures("environment")
async def test_reconcile_fails_when_stripe_cannot_be_asked(resources: Resources, fake_stripe: FakeStripe) -> None:
    await make_deliveries(resources, fake_stripe, "5")
    await deliver(resources)
    await run(resources, "DELETE FROM meters")
    failed = await tallystick("reconcile", "--stripe")
    assert (failed.exit_code, "Stripe has no such meter" in failed.stderr) == (1, True)
    assert failed.stdout.endswith("Not everything could be compared: see above.\n")


@pytest.mark.usefixtures("environment")
async def test_what_stripe_says_when_it_refuses_is_told(resources: Resources, fake_stripe: FakeStripe) -> None:
    await make_deliveries(resources, fake_stripe, "5")
    await deliver(resources)
    await run(resources, "UPDATE meters SET id = 'mtr_gone'")
    failed = await tallystick("reconcile", "--stripe")
    assert "Stripe answered 404: " in failed.stderr
    assert "mtr_gone" in failed.stderr


@pytest.mark.usefixtures("environment")
async def test_a_stripe_that_is_away_is_told_without_names_of_code(
    resources: Resources, fake_stripe: FakeStripe, monkeypatch: pytest.MonkeyPatch
) -> None:
    customer = await make_deliveries(resources, fake_stripe, "5")
    await deliver(resources)
    monkeypatch.setenv("STRIPE_API_BASE", "http://127.0.0.1:1")
    failed = await tallystick("reconcile", "--stripe")
    away = "Stripe: connection refused; can it be reached from here?"
    assert (failed.exit_code, failed.stderr) == (1, f"not compared: {customer} {METER}: {away}\n")


@pytest.mark.usefixtures("environment")
async def test_usage_of_nobody_is_an_error_and_that_of_a_new_customer_is_not(resources: Resources) -> None:
    await make_customer(resources)
    await make_meter(resources)
    for option, name in (("--customer", "acmee"), ("--meter", "api_request")):
        refused = await tallystick("reconcile", option, name, "--stripe")
        assert (refused.exit_code, refused.stdout) == (1, "")
        assert refused.stderr.endswith(f"error: there is no usage of '{name}'\n")
    assert (await tallystick("reconcile", "--customer", REF, "--meter", METER)).exit_code == 0


@pytest.mark.usefixtures("environment")
async def test_a_time_that_is_none_is_named() -> None:
    refused = await tallystick("reconcile", "--from", "yesterday")
    assert (refused.exit_code, "--from is no time" in refused.stderr) == (1, True)
    # Of a time without hours nothing is missing; it must not look as if everything were well.
    refused = await tallystick("reconcile", "--from", "2026-02-01", "--to", "2026-01-01")
    assert (refused.exit_code, refused.stdout, refused.stderr) == (1, "", "error: --to must lie after --from\n")


@pytest.mark.usefixtures("environment")
async def test_periods_shows_the_drafts(resources: Resources) -> None:
    assert (await tallystick("periods")).stdout == "There is no draft invoice.\n"
    await make_customer(resources)
    await make_meter(resources)
    now = datetime.now(UTC)
    await make_period(resources, now - timedelta(days=30), now - timedelta(minutes=10))
    await make_invoice(resources)
    shown = (await tallystick("periods")).stdout
    assert CUSTOMER in shown
    assert "49 min" in shown
    assert "nothing" in shown
    (period,) = json.loads((await tallystick("periods", "--json")).stdout)
    assert (period["invoice"], period["confirmed"]) == ("in_1", True)
