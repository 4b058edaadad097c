"""`scripts/run`, and the commands beside it."""

import asyncio
import contextlib
import json
import os
import re
import sys
from pathlib import Path

import httpx
import pytest
from rich.console import Console
from typer.testing import CliRunner

from tallystick import cli
from tallystick.dev.introduction import introduce
from tallystick.dev.settings_file import write_shell
from tallystick.dev.stack import Stack, run_until_stopped
from tests.waiting import wait_until

SCRIPT = Path(__file__).parents[2] / "scripts" / "run"


async def call(*arguments: str, folder: Path, **own: str) -> tuple[int | None, str]:
    """`scripts/run ARGUMENTS` in a folder, with no settings but its `own`; how it ended, and what it said."""
    settings = ("TALLYSTICK_", "STRIPE_", "DATABASE_URL", "REDIS_URL")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(settings)} | own
    # As where somebody has activated .venv, which must not be made anew for it.
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    process = await asyncio.create_subprocess_exec(
        str(SCRIPT),
        *arguments,
        cwd=folder,
        env=environment,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    said, _ = await process.communicate()
    return process.returncode, said.decode()


# It starts a stack, and scripts/run four times beside it.
@pytest.mark.timeout(120)
async def test_commands_find_the_settings_of_the_stack_that_runs_beside_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("TALLYSTICK_PORT", "TALLYSTICK_FAKE_STRIPE_PORT"):
        monkeypatch.setenv(name, "0")
    settings = tmp_path / ".tallystick" / "settings.sh"
    stop = asyncio.Event()
    running = asyncio.create_task(
        run_until_stopped(settings.parent, stop, Console(quiet=True)),
    )

    async def is_written() -> bool:
        return settings.exists() or running.done()

    await wait_until(is_written)
    code, said = await call("keys", "list", "--json", folder=tmp_path)
    modes = {file.name: file.stat().st_mode & 0o777 for file in settings.parent.glob("fake-stripe.db*")}
    second = await call("run", folder=tmp_path, TALLYSTICK_PORT="0", TALLYSTICK_FAKE_STRIPE_PORT="0")
    is_left = settings.exists()
    stop.set()
    await running
    assert modes
    assert set(modes.values()) == {0o600}
    assert (second[0], "is already running" in second[1], is_left) == (1, True, True)
    assert code == 0
    assert [key["name"] for key in json.loads(said)] == ["development"]
    assert not settings.exists()
    code, said = await call("keys", "list", folder=tmp_path)
    assert code == 1
    assert f"nothing runs here (no .tallystick/settings.sh in {tmp_path})" in said
    code, said = await call("keys", "list", "--help", folder=tmp_path)
    assert (code, "Usage: " in said) == (0, True)


async def test_commands_know_the_settings_that_were_given_and_ask_for_what_is_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given = {
        "DATABASE_URL": "postgresql://someone:hidden@127.0.0.1:1/none",
        "STRIPE_API_KEY": "sk_test_hidden",
        "TALLYSTICK_JWT_SECRET": "hidden" * 8,
        "TALLYSTICK_RULES_FILE": "rules.toml",
        "TALLYSTICK_PORT": "0",
    }
    text = write_shell({"REDIS_URL": "redis://127.0.0.1:1/0", "TALLYSTICK_PORT": "8081"}, given)
    assert "hidden" not in text
    assert f"TALLYSTICK_RULES_FILE={tmp_path}/rules.toml" in text
    assert "TALLYSTICK_PORT=8081" in text
    (tmp_path / ".tallystick").mkdir()
    (tmp_path / ".tallystick" / "settings.sh").write_text(text)

    code, said = await call("access", "recompute", folder=tmp_path, DATABASE_URL=given["DATABASE_URL"])
    assert code == 1
    assert said.endswith("set them here, too: STRIPE_API_KEY\n")
    secrets = {"STRIPE_API_KEY": "sk_test_hidden", "STRIPE_WEBHOOK_SECRET": "whsec_for_tests"}
    code, said = await call("access", "recompute", folder=tmp_path, DATABASE_URL=given["DATABASE_URL"], **secrets)
    assert code == 1
    assert f"{tmp_path}/rules.toml" in said


def test_what_is_used_of_your_own_is_said_without_passwords_or_commands_that_fail_there(tmp_path: Path) -> None:
    environment = {
        "DATABASE_URL": "postgresql://someone:hid%40den@db.example.com/tally?sslmode=require",
        "REDIS_URL": "rediss://:hidden@redis.example.com:6380/0",
        "STRIPE_API_KEY": "sk_test_hidden",
        "STRIPE_WEBHOOK_SECRET": "whsec_hidden",
        "TALLYSTICK_PORT": "8080",
    }
    said = introduce(Stack(tmp_path, environment, None, None), "tsk_0123456789ab_key")
    assert "PostgreSQL yours, from DATABASE_URL: postgresql://db.example.com/tally\n" in said
    assert "Redis      yours, from REDIS_URL: rediss://redis.example.com:6380/0\n" in said
    assert "Stripe     yours, from STRIPE_API_KEY: https://api.stripe.com, in test mode\n" in said
    assert "hid" not in said
    assert "acme" not in said


@pytest.mark.parametrize(
    ("arguments", "own", "error"),
    [
        (["run", "--data", "a_file"], {}, "a_file cannot be the data folder: Not a directory"),
        (["run"], {"TALLYSTICK_PORT": "abc"}, "TALLYSTICK_PORT is no port from 0 to 65535: abc"),
        (["run"], {"TALLYSTICK_PORT": "99999"}, "TALLYSTICK_PORT is no port from 0 to 65535: 99999"),
        (["run"], {"TALLYSTICK_FAKE_STRIPE_PORT": "x"}, "TALLYSTICK_FAKE_STRIPE_PORT is no port from 0 to 65535: x"),
        (
            ["fake-stripe", "--port", "0", "--state", "a_file"],
            {},
            "a_file cannot hold the fake Stripe's state: file is not a database",
        ),
    ],
)
def test_what_cannot_be_started_ends_in_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    own: dict[str, str],
    error: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a_file").write_text("no database, and no folder\n")
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.argv", ["tallystick", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    said = capsys.readouterr().err.splitlines()
    assert (len(said), said[0].startswith("error: "), said[0].endswith(error)) == (1, True, True)


async def test_the_fake_stripe_says_where_it_is() -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tallystick", "fake-stripe", "--port", "0"), stderr=asyncio.subprocess.PIPE
    )
    try:
        assert process.stderr is not None
        said = (await asyncio.wait_for(process.stderr.readline(), 20)).decode()
        found = re.fullmatch(r"The fake Stripe is at (http://127\.0\.0\.1:[1-9]\d*); Ctrl-C ends it\.\n", said)
        assert found is not None

        async def answers() -> bool:
            with contextlib.suppress(httpx.TransportError):
                async with httpx.AsyncClient() as client:
                    return (await client.get(f"{found[1]}/_fake/clock")).is_success
            return False

        await wait_until(answers)
    finally:
        process.terminate()
        await process.wait()


def test_a_port_that_is_none_is_refused_by_the_fake_stripe() -> None:
    assert CliRunner().invoke(cli.app, ["fake-stripe", "--port", "99999"]).exit_code == 2
