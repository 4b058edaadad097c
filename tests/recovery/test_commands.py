"""The commands as an operator types them."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from sqlalchemy import text
from typer.testing import CliRunner, Result

from tallystick import cli, db
from tallystick.config import Settings
from tallystick.resources import open_resources
from tests.conftest import Servers, empty_stores
from tests.recovery.test_doctor import environment

URL = "https://billing.example.com/webhooks/stripe"

Call = Callable[..., dict[str, Any]]


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, list(arguments), catch_exceptions=False)


def change(settings: Settings, statement: str | None = None) -> None:
    """Empty the stores, or run a statement on them."""

    async def work() -> None:
        async with open_resources(settings, application_name="tests") as resources:
            if statement is None:
                await empty_stores(resources)
            else:
                async with db.transaction(resources.engine) as connection:
                    await connection.execute(text(statement))

    asyncio.run(work())


@pytest.fixture
def call(servers: Servers, fake_stripe_url: str, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Call:
    """Calls to a fake Stripe that has one customer, beside empty stores."""
    for name, value in environment(servers, fake_stripe_url).items():
        monkeypatch.setenv(name, value)
    change(settings)

    def post(path: str, **form: str) -> dict[str, Any]:
        answer = httpx.post(f"{fake_stripe_url}{path}", data=form, headers={"Authorization": "Bearer sk_test_1"})
        answer.raise_for_status()
        made: dict[str, Any] = answer.json()
        return made

    httpx.post(f"{fake_stripe_url}/_fake/reset").raise_for_status()
    post("/v1/customers", name="acme")
    return post


def test_recover_says_what_was_missing_and_until_when_it_is_complete(call: Call) -> None:
    first = run("recover")
    assert first.exit_code == 0
    assert "1 of 1 listed events were missing and are applied now." in first.stdout
    assert "The events are complete until" in first.stdout

    second = run("recover", "--json")
    assert second.exit_code == 0
    told = json.loads(second.stdout)
    assert (told["listed"], told["recovered"], told["failed"], told["gap_from"]) == (1, 0, 0, None)
    assert told["complete_until"] is not None


def test_recover_tells_of_a_gap_and_sync_closes_it(call: Call, settings: Settings) -> None:
    run("recover")
    change(settings, "UPDATE event_recovery SET complete_until = now() - interval '40 days'")

    told = run("recover")
    assert told.exit_code == 1
    assert "are lost: Stripe lists 30 days only. Run: tallystick sync" in told.stderr

    assert run("sync").exit_code == 0
    assert run("recover").exit_code == 0


def test_recover_waits_for_another_process(call: Call, settings: Settings) -> None:
    run("recover")
    change(settings, "UPDATE event_recovery SET leased_by = 'dead', leased_until = now() + interval '500 milliseconds'")

    assert run("recover").exit_code == 0


def test_sync_counts_what_it_read(call: Call) -> None:
    synced = run("sync")
    assert synced.exit_code == 0
    assert [line.split() for line in synced.stdout.splitlines()] == [
        ["0", "meters"],
        ["0", "products"],
        ["0", "active", "prices"],
        ["0", "inactive", "prices"],
        ["1", "customers"],
        ["0", "subscriptions"],
        ["0", "open", "invoices"],
        ["0", "uncollectible", "invoices"],
        ["0", "recent", "invoices"],
        ["0", "completed", "checkouts"],
        ["0", "payment", "methods"],
        ["0", "entitlements"],
    ]
    assert json.loads(run("sync", "--all-invoices", "--json").stdout)["objects"]["invoices"] == 0


@pytest.mark.parametrize(
    "command", [["recover"], ["sync"], ["sync", "--check"], ["access", "recompute"], ["reconcile", "--stripe"]]
)
def test_a_command_in_a_pipe_leaves_nothing_of_its_progress_bar(command: list[str], call: Call) -> None:
    run("sync")
    done = run(*command)
    assert (done.exit_code, done.stderr) == (0, "")


def test_a_sync_that_stripe_refuses_at_once_is_not_one_to_go_on_with(
    call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("sync").exit_code == 0
    with monkeypatch.context() as wrong:
        wrong.setenv("STRIPE_API_KEY", "s3cret")
        assert run("sync").exit_code == 1
    assert "sync" not in [each["part"] for each in json.loads(run("doctor", "--json").stdout)]


def test_check_exits_with_1_until_it_has_repaired(call: Call, settings: Settings) -> None:
    run("sync")
    assert run("sync", "--check").exit_code == 0
    change(settings, "UPDATE customers SET delinquent = true")

    found = run("sync", "--check")
    assert found.exit_code == 1
    assert "delinquent  True  False" in found.stdout
    assert "1 objects compared, 1 differ." in found.stdout

    repaired = run("sync", "--check", "--sample", "5", "--repair", "--json")
    assert repaired.exit_code == 0
    [mended] = json.loads(repaired.stdout)["drift"]
    assert (mended["kind"], mended["repaired"]) == ("customer", True)
    assert mended["differences"] == [{"field": "delinquent", "here": True, "stripe": False}]
    assert run("sync", "--check").exit_code == 0


def test_sample_and_repair_need_check(call: Call) -> None:
    for option in (["--sample", "3"], ["--repair"]):
        refused = run("sync", *option)
        assert refused.exit_code == 1
        assert "go with --check" in refused.stderr


def test_replay_shows_the_verdicts(call: Call, settings: Settings) -> None:
    run("recover")
    change(settings, "UPDATE stripe_events SET verdict = 'quarantined', error = 'KeyError'")

    shown = run("replay", "--quarantined")
    assert shown.exit_code == 0
    [_, line] = shown.stdout.splitlines()
    event, *verdicts = line.split()
    assert verdicts[0] == "quarantined"
    assert verdicts[1] in ("applied", "stale")

    [again] = json.loads(run("replay", event, event, "--json").stdout)
    assert (again["id"], again["problem"]) == (event, None)
    assert run("replay", "--quarantined").stdout.strip() == "There is nothing to replay."
    unknown = run("replay", "evt_unknown")
    assert unknown.exit_code == 1
    assert "30 days" in unknown.stdout
    assert run("replay").exit_code == 1
    assert run("replay", event, "--quarantined").exit_code == 1


def test_setup_prints_the_secret_once(call: Call) -> None:
    made = run("webhooks", "setup", "--url", URL)
    assert made.exit_code == 0
    assert made.stdout.startswith("whsec_")
    assert "is created" in made.stderr

    again = run("webhooks", "setup", "--url", URL)
    assert again.stdout == ""
    assert "is unchanged" in again.stderr
    assert json.loads(run("webhooks", "setup", "--url", URL, "--json").stdout)["secret"] is None


def test_doctor_has_a_line_for_each_part(call: Call) -> None:
    ill = run("doctor")
    assert ill.exit_code == 1
    assert "ok     settings: all are there" in ill.stdout
    assert "wrong  webhook endpoint: there is none in test mode" in ill.stdout
    told = json.loads(run("doctor", "--json").stdout)
    assert {part["part"]: part["ok"] for part in told}["PostgreSQL"] is True


def test_every_command_says_what_it_does() -> None:
    for command in (["recover"], ["replay"], ["sync"], ["webhooks", "setup"], ["doctor"]):
        shown = run(*command, "--help")
        assert shown.exit_code == 0
        assert "--json" in shown.stdout
