"""`tallystick keys` as an operator uses it."""

import json
import re

import pytest
from typer.testing import CliRunner, Result

from tallystick import cli, terminal
from tests.conftest import Servers


@pytest.fixture(autouse=True)
def environment(servers: Servers, fake_stripe_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "DATABASE_URL": servers.postgres.url,
        "REDIS_URL": servers.valkey.url,
        "STRIPE_API_KEY": "sk_test_for_tests",
        "STRIPE_WEBHOOK_SECRET": "whsec_for_tests",
        "STRIPE_API_BASE": fake_stripe_url,
    }.items():
        monkeypatch.setenv(name, value)
    run("migrate")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, list(arguments), catch_exceptions=False)


def listed(key: str) -> dict[str, object]:
    keys: list[dict[str, object]] = json.loads(run("keys", "list", "--json").stdout)
    return next(one for one in keys if one["id"] == key.split("_")[1])


def test_a_key_is_rolled_and_the_list_says_until_when_the_old_secret_works() -> None:
    first = run(
        *("keys", "create", "gateway", "--scope", "usage:write", "--limit-per-second", "50", "--expires-in-days", "90")
    ).stdout.strip()
    rolled = run("keys", "roll", first.split("_")[1], "--overlap-hours", "48")
    assert rolled.exit_code == 0
    second = rolled.stdout.strip()
    assert second.split("_")[1] == first.split("_")[1]
    assert second != first
    shown = listed(first)
    assert (shown["limit_per_second"], shown["state"]) == (50, "valid")
    for name in ("created_at", "expires_at", "rolled_at", "old_valid_until"):
        assert re.match(r"\d{4}-\d\d-\d\dT\d\d:", str(shown[name])), "RFC 3339, as wherever a program reads a time"
    people = " ".join(run("keys", "list").stdout.split())
    for word in (first.split("_")[1], "gateway", "50/s", "rolled"):
        assert word in people
    for secret in (first, second):
        assert secret.split("_", 2)[2] not in run("keys", "list", "--json").stdout + people


def test_ids_and_scopes_stay_whole_in_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    key = run("keys", "create", "a rather long name", "--scope", "customers:write", "--scope", "portal:create").stdout
    for name, value in (("_force_terminal", True), ("_width", 60), ("_height", 25)):
        monkeypatch.setattr(terminal.out, name, value)
    shown = run("keys", "list").stdout
    assert {key.split("_")[1], "customers:write", "portal:create"} <= set(shown.split())
    assert "a rather long name" not in shown  # folded, to find room


def test_rows_are_whole_where_no_terminal_shows_them() -> None:
    name = "a name that is longer than a terminal is wide, and that somebody looks for by `grep`"
    run("keys", "create", name, "--scope", "usage:read", "--source", "elsewhere")
    assert name in run("keys", "list").stdout


def test_a_key_that_leaked_is_rolled_without_an_overlap() -> None:
    key = run("keys", "create", "leaked", "--scope", "usage:read").stdout.strip()
    run("keys", "roll", key.split("_")[1], "--overlap-hours", "0")
    assert listed(key)["old_valid_until"] is None


def test_a_key_that_leaked_is_revoked_as_it_was_found_and_never_shown() -> None:
    key = run("keys", "create", "leaked", "--scope", "usage:read").stdout.strip()
    secret = key.split("_", 2)[2]
    for given in (key, f"x{secret}", f"sk_{key}"):
        said = run("keys", "revoke", given)
        assert said.exit_code == (0 if given == key else 1)
        assert secret not in said.stdout + said.stderr
    assert listed(key)["state"] == "revoked"


def test_scopes_that_are_given_as_one_are_told_apart() -> None:
    refused = run("keys", "create", "x", "--scope", "usage:write,usage:read")
    assert refused.exit_code == 1
    assert "--scope usage:write --scope usage:read" in refused.stderr


def test_only_a_valid_key_is_rolled() -> None:
    refused = run("keys", "roll", "000000000000")
    assert refused.exit_code == 1
    assert "there is no valid key 000000000000" in refused.stderr


def test_a_card_number_is_no_name() -> None:
    refused = run("keys", "create", "4242 4242 4242 4242", "--scope", "usage:read")
    assert refused.exit_code == 1
    assert "card number" in refused.stderr
