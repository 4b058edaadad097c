"""`scripts/run`, and the commands beside it."""

import asyncio
import json
import os
import sys
from pathlib import Path

import pytest
from rich.console import Console

from tallystick.dev.stack import run_until_stopped
from tests.waiting import wait_until

SCRIPT = Path(__file__).parents[2] / "scripts" / "run"


async def call(*arguments: str, folder: Path) -> tuple[int | None, str]:
    """`scripts/run ARGUMENTS` in a folder, without settings of its own; how it ended, and what it said."""
    settings = ("TALLYSTICK_", "STRIPE_", "DATABASE_URL", "REDIS_URL")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(settings)}
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
    stop.set()
    await running
    assert code == 0
    assert [key["name"] for key in json.loads(said)] == ["development"]
    assert not settings.exists()
    code, said = await call("keys", "list", folder=tmp_path)
    assert code == 1
    assert "DATABASE_URL is not set" in said
