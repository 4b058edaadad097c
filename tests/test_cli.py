"""The command line as an operator uses it, over a database of its own."""

import json
import socket
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from tallystick import __version__, cli
from tests.conftest import Servers


@pytest.fixture
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


COMMANDS = (
    *("run", "demo", "fake-stripe", "serve", "worker", "migrate", "flush", "keys", "doctor"),
    *("reconcile", "periods", "corrections", "parked"),
    *("access", "notifications", "recover", "replay", "sync", "webhooks"),
)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, list(arguments), catch_exceptions=False)


@pytest.mark.usefixtures("environment")
def test_a_key_is_made_listed_and_revoked() -> None:
    made = run("keys", "create", "billing job", "--scope", "usage:write", "--scope", "usage:read", "--source", "jobs")
    assert made.exit_code == 0
    key_id = made.stdout.strip().split("_")[1]
    listed = {key["id"]: key for key in json.loads(run("keys", "list", "--json").stdout)}
    assert (listed[key_id]["source"], listed[key_id]["state"]) == ("jobs", "valid")
    assert {"billing", "job"} <= set(run("keys", "list").stdout.split())  # folded where it must be
    assert run("keys", "revoke", key_id).exit_code == 0
    again = run("keys", "revoke", key_id)
    assert again.exit_code == 1
    assert "there is no valid key" in again.stderr


@pytest.mark.usefixtures("environment")
def test_an_unknown_scope_is_named_with_those_that_exist() -> None:
    refused = run("keys", "create", "x", "--scope", "usage")
    assert refused.exit_code == 1
    assert "unknown scope 'usage'" in refused.stderr
    assert "usage:write" in refused.stderr


@pytest.mark.usefixtures("environment")
def test_flush_answers_people_and_programs() -> None:
    assert json.loads(run("flush", "--json").stdout).keys() == {"sealed", "tried"}
    assert run("flush").stdout.startswith("Sealed ")


def test_a_missing_setting_ends_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["tallystick", "flush"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    missing = [f"{name} is not set" for name in ("DATABASE_URL", "REDIS_URL", "STRIPE_API_KEY")]
    assert capsys.readouterr().err.splitlines() == ["error: " + "; ".join(missing)]


@pytest.mark.usefixtures("environment", "fake_stripe")
def test_only_who_receives_webhooks_needs_their_secret(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("STRIPE_WEBHOOK_SECRET")
    assert run("migrate").exit_code == 0
    made = run("webhooks", "setup", "--url", "https://billing.example.com/webhooks/stripe", "--json")
    assert json.loads(made.stdout)["secret"].startswith("whsec_")
    monkeypatch.setattr("sys.argv", ["tallystick", "serve"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    [line] = capsys.readouterr().err.splitlines()
    assert "STRIPE_WEBHOOK_SECRET is not set: tallystick webhooks setup" in line


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize(
    ("command", "name"),
    [
        (["serve"], "TALLYSTICK_PORT"),
        (["worker"], "TALLYSTICK_WORKER_METRICS_PORT"),
        (["fake-stripe", "--port"], "--port"),
    ],
)
def test_a_port_that_is_taken_ends_in_one_line(
    command: list[str], name: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        monkeypatch.setenv(name, port)
        monkeypatch.setattr("sys.argv", ["tallystick", *command, *([port] if "--port" in command else [])])
        with pytest.raises(SystemExit) as ended:
            cli.main()
    assert ended.value.code == 1
    said = capfd.readouterr()
    assert said.err == f"error: port {port} ({name}) is taken: is another tallystick running?\n"
    assert said.out == ""


@pytest.mark.usefixtures("environment")
def test_rules_that_cannot_be_read_end_in_one_line_before_anything_is_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TALLYSTICK_RULES_FILE", str(tmp_path / "rules.toml"))
    monkeypatch.setenv("TALLYSTICK_PORT", "0")
    monkeypatch.setattr("sys.argv", ["tallystick", "serve"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    [line] = capfd.readouterr().err.splitlines()
    assert line == f"error: TALLYSTICK_RULES_FILE {tmp_path / 'rules.toml'}: No such file or directory"


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize(
    ("command", "name", "value", "said"),
    [
        (
            ["migrate"],
            "DATABASE_URL",
            "postgresql://127.0.0.1:1/none",
            "PostgreSQL: connection refused; is DATABASE_URL right, and the server up?",
        ),
        (["migrate"], "DATABASE_URL", "{server}/none", 'PostgreSQL: database "none" does not exist; make it'),
        (["keys", "list"], "DATABASE_URL", "{server}/template1", "the schema is not up to date: tallystick migrate"),
        (["migrate"], "DATABASE_URL", "{server}/tallystick?sslmode=require", "PostgreSQL: the server has no TLS"),
        (["migrate"], "DATABASE_URL", "postgresql://me:s3cret@s3cret.invalid/x", "PostgreSQL: its host cannot be res"),
        (
            ["migrate"],
            "DATABASE_URL",
            "postgresql://nobody:s3cret@127.0.0.1:{port}/tallystick",
            'PostgreSQL: role "nobody" does not exist; is DATABASE_URL right? (in a password, write @ as %40',
        ),
        (["flush"], "REDIS_URL", "redis://:s3cret@127.0.0.1:1", "Redis: connection refused; is REDIS_URL right"),
        (["webhooks", "setup", "--url", "https://a.example/"], "STRIPE_API_KEY", "s3cret", "Stripe: STRIPE_API_KEY is"),
    ],
)
def test_a_part_that_fails_is_named_in_one_line(
    command: list[str],
    name: str,
    value: str,
    said: str,
    servers: Servers,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    server = servers.postgres.url.rpartition("/")[0]
    monkeypatch.setenv(name, value.format(server=server, port=servers.postgres.port))
    monkeypatch.setattr("sys.argv", ["tallystick", *command])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {said}")
    assert "s3cret" not in line


def test_the_version_is_printed() -> None:
    assert run("--version").stdout == f"tallystick {__version__}\n"
    assert run("--version").exit_code == 0


def test_every_command_says_what_it_does(project_root: Path) -> None:
    readme = (project_root / "README.md").read_text()
    shown = run("--help").stdout
    for command in COMMANDS:
        assert command in shown
        assert command in readme
        assert run(command, "--help").exit_code == 0
